//! containerd's client with CNI plugins, which it calls between create and start.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::Story;
use crate::command::{eventually, shell};

pub const STORIES: &[(&str, Story)] =
    &[("plugins_connect_containers_of_both_runtimes", plugins_connect_containers_of_both_runtimes)];

/// Where containerd's client looks for plugins, and where Debian has them.
const PLUGINS: (&str, &str) = ("/opt/cni", "/usr/lib/cni");

/// A list of plugins in the place where the client looks, and the client's path to them. Both go when it is dropped.
struct Plugins {
    file: &'static Path,
}

impl Plugins {
    fn install() -> Result<Plugins> {
        let plugins = Plugins { file: Path::new("/etc/cni/net.d/10-e2e.conflist") };
        fs::create_dir_all("/etc/cni/net.d")?;
        fs::create_dir_all(PLUGINS.0)?;
        std::os::unix::fs::symlink(PLUGINS.1, format!("{}/bin", PLUGINS.0))?;
        let list = json!({
            "cniVersion": "1.0.0",
            "name": "e2e",
            "plugins": [{
                "type": "bridge",
                "bridge": "e2e-cni",
                "isGateway": true,
                "ipMasq": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{ "subnet": "10.80.0.0/24" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                    "dataDir": "/run/e2e-cni",
                },
            }],
        });
        fs::write(plugins.file, serde_json::to_vec(&list)?)?;
        Ok(plugins)
    }
}

impl Drop for Plugins {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.file);
        let _ = fs::remove_dir_all(PLUGINS.0);
        let _ = fs::remove_dir_all("/run/e2e-cni");
        let _ = shell("ip link delete e2e-cni");
    }
}

fn plugins_connect_containers_of_both_runtimes() -> Result<()> {
    let _plugins = Plugins::install()?;
    let image = shell("ctr images ls -q | grep busybox | head -n 1")?.expect_code(0)?.text();
    let servers =
        [("one", "rvm", "10.80.0.2"), ("other", "rvm", "10.80.0.3"), ("plain", "runc", "10.80.0.4")];
    for (name, runtime, place) in servers {
        let serve = format!("mkdir /www; echo {name} >/www/index.html; exec httpd -f -p 80 -h /www");
        let client =
            format!("ctr run -d --cni --runtime io.containerd.runc.v2 --runc-binary $(command -v {runtime})");
        shell(&format!("{client} {image} {name} sh -c '{serve}' </dev/null >/dev/null 2>&1"))?
            .expect_code(0)?;
        let shown = shell(&format!("ctr task exec --exec-id look {name} ip -o -4 address show eth0"))?;
        let shown = shown.expect_code(0)?.text();
        ensure!(shown.contains(&format!("{place}/24")), "{name} has: {shown}");
    }
    for (client, ..) in servers {
        for (server, _, place) in servers {
            let ask = format!("ctr task exec --exec-id ask {client} wget -q -O - http://{place}/");
            eventually(&format!("{server} answers {client}"), || Ok(shell(&ask)?.text() == server))?;
        }
    }
    for (name, _, place) in servers {
        shell(&format!("curl -s -m 60 http://{place}/"))?.expect_text(name)?;
        shell(&format!("ctr task kill -s KILL {name}; ctr task rm {name}; ctr container rm {name}"))?;
    }
    Ok(())
}
