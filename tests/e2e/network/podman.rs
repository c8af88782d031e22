//! podman's networks: netavark makes them, and aardvark-dns serves names at the address of the bridge.

use anyhow::{Context, Result};

use crate::Story;
use crate::command::{Outcome, eventually, run, shell};

pub const STORIES: &[(&str, Story)] =
    &[("podmans_networks_have_names_and_ports", podmans_networks_have_names_and_ports)];

fn podman(arguments: &[&str]) -> Result<Outcome> {
    run("podman", arguments)
}

fn podmans_networks_have_names_and_ports() -> Result<()> {
    podman(&["network", "create", "--subnet", "10.87.7.0/24", "e2e-podman"])?.expect_code(0)?;
    let outcome = names_and_ports();
    let _ = shell("podman ps -aq | xargs -r podman rm -f -t 0");
    podman(&["network", "rm", "e2e-podman"])?.expect_code(0)?;
    outcome
}

fn names_and_ports() -> Result<()> {
    let serve = "mkdir /www; hostname >/www/index.html; exec httpd -f -p 80 -h /www";
    for (name, runtime, port) in
        [("one", "rvm", "18086:80"), ("other", "rvm", "18087:80"), ("plain", "runc", "18088:80")]
    {
        let runtime = format!("/usr/{}/{runtime}", if runtime == "rvm" { "local/bin" } else { "sbin" });
        let start = ["--runtime", &runtime, "run", "-d", "--network", "e2e-podman", "--name", name];
        let program = ["--hostname", name, "-p", port, "busybox", "sh", "-c", serve];
        podman(&[&start[..], &program].concat())?.expect_code(0)?;
    }
    for client in ["one", "other", "plain"] {
        for server in ["one", "other", "plain"] {
            eventually("the server answers by its name", || {
                Ok(podman(&["exec", client, "wget", "-q", "-O", "-", &format!("http://{server}/")])?.text()
                    == server)
            })
            .with_context(|| format!("{client} asks {server}"))?;
        }
    }
    for (port, name) in [("18086", "one"), ("18087", "other"), ("18088", "plain")] {
        shell(&format!("curl -s -m 60 http://127.0.0.1:{port}/"))?.expect_text(name)?;
    }
    Ok(())
}
