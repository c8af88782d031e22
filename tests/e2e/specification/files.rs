//! The container's files: its mounts, its devices, and what of them is masked or write-protected.

use anyhow::{Result, ensure};
use serde_json::json;

use super::same_text;
use crate::Story;
use crate::bundle::{Bundle, add_mounts, mount};
use crate::command::shell;

pub const STORIES: &[(&str, Story)] = &[
    ("mounts_come_in_their_order", mounts_come_in_their_order),
    ("nodes_and_paths_are_as_described", nodes_and_paths_are_as_described),
];

fn mounts_come_in_their_order() -> Result<()> {
    let script = "cat /outer/inner/file /link/file /etc/story /twice/file; ls /outer; \
                  echo x 2>/dev/null >/outer/inner/x || echo read-only; echo x >/link/x && echo written; \
                  echo x 2>/dev/null >/etc/story || echo read-only; /link/program 2>/dev/null || echo no program; \
                  stat -c '%a %u %g' /outer; df -k /outer | awk 'END {print $2}'; \
                  awk '{sub(/,(no|rel)atime/, \"\", $6); o[$5] = $6} END {print o[\"/outer\"], o[\"/outer/inner\"]}' /proc/self/mountinfo; \
                  touch /new 2>/dev/null || echo read-only; touch /outer/inner/deep/new && echo written";
    let bundle = Bundle::new(&["sh", "-c", script])?;
    let folder = bundle.path().to_owned();
    shell(&format!(
        "cd {folder} && mkdir -p volume/deep second && echo of the volume >volume/file && echo second >second/file && \
         printf '#!/bin/sh\\necho ran\\n' >second/program && chmod 755 second/program && \
         ln -s outer/real rootfs/link && ln -s ../../../.. rootfs/escape"
    ))?
    .expect_code(0)?;
    let bundle = bundle.edit(|config| {
        config["root"]["readonly"] = json!(true);
        for set in ["bounding", "permitted", "effective"] {
            config["process"]["capabilities"][set] = json!(["CAP_DAC_OVERRIDE"]);
        }
        let options = ["nosuid", "nodev", "noexec", "mode=1750", "size=64k", "uid=3", "gid=4"];
        add_mounts(
            config,
            [
                mount("/outer", "tmpfs", "tmpfs", &options),
                // A source that is no absolute path is one of the bundle's.
                mount("/outer/inner", "bind", "volume", &["rbind", "ro", "nosuid", "nodev", "noexec"]),
                mount("/outer/inner/deep", "tmpfs", "tmpfs", &["size=4k"]),
                // Links are those of the container, and none leads out of it.
                mount("/link", "bind", &format!("{folder}/second"), &["bind", "noexec"]),
                mount("/escape/outer/caught", "tmpfs", "tmpfs", &["size=4k"]),
                mount("/etc/story", "bind", &format!("{folder}/second/file"), &["bind", "ro"]),
                mount("/twice", "bind", &format!("{folder}/second"), &["bind"]),
                mount("/twice", "bind", &format!("{folder}/volume"), &["bind"]),
            ],
        );
    })?;
    let expected = "of the volume\nsecond\nsecond\nof the volume\ncaught\ninner\nreal\nread-only\nwritten\n";
    let printed = same_text(&bundle)?;
    ensure!(printed.starts_with(expected) && printed.ends_with("\nread-only\nwritten"), "{printed}");
    Ok(())
}

fn nodes_and_paths_are_as_described() -> Result<()> {
    let script = "cd /dev && for f in null zero full random urandom tty story deep/er/zero pipe; do \
                  stat -c '%n %F %a %u %g %t:%T' $f; done; for f in fd stdin stdout stderr ptmx; do readlink $f; done; \
                  echo x >story && head -c 3 deep/er/zero | wc -c; mknod /tmp/null c 1 3 && echo x >/tmp/null && echo allowed; \
                  mknod /tmp/port c 4 64 2>&1; cat /tmp/port 2>&1; mknod /tmp/disk b 7 0 2>&1; rm -f /tmp/null /tmp/port /tmp/disk; \
                  cat /data/secret; ls -A /data/secrets; echo x 2>/dev/null >/data/secrets/x || echo read-only; \
                  cat /data/kept /data/shown/file; echo x 2>/dev/null >/data/kept || echo read-only; \
                  rm /data/shown/file 2>/dev/null || echo read-only; echo x >/data/free && cat /data/free; \
                  cat /linked/secret";
    let bundle = Bundle::new(&["sh", "-c", script])?;
    shell(&format!(
        "cd {}/rootfs && mkdir -p data/secrets data/shown && echo secret >data/secret && echo key >data/secrets/key && \
         echo kept >data/kept && echo shown >data/shown/file && ln -s data linked",
        bundle.path()
    ))?
    .expect_code(0)?;
    let bundle = bundle.edit(|config| {
        config["linux"]["maskedPaths"] = json!(["/data/secret", "/data/secrets", "/data/absent"]);
        config["linux"]["readonlyPaths"] = json!(["/data/kept", "/data/shown", "/data/absent"]);
        config["linux"]["devices"] = json!([
            { "path": "/dev/story", "type": "c", "major": 1, "minor": 3, "fileMode": 0o620, "uid": 7, "gid": 8 },
            { "path": "/dev/deep/er/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o666, "uid": 0, "gid": 0 },
            { "path": "/dev/pipe", "type": "p", "fileMode": 0o600, "uid": 1, "gid": 2 },
        ]);
        config["linux"]["resources"]["devices"] = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 4, "minor": 64, "access": "m" },
        ]);
        for set in ["bounding", "permitted", "effective"] {
            config["process"]["capabilities"][set] = json!(["CAP_MKNOD"]);
        }
    })?;
    let printed = same_text(&bundle)?;
    let nodes = "story character special file 620 7 8 1:3\ndeep/er/zero character special file 666 0 0 1:5\npipe fifo 600 1 2 0:0\n";
    let paths = "read-only\nkept\nshown\nread-only\nread-only\nx";
    ensure!(printed.contains(nodes) && printed.ends_with(paths), "{printed}");
    Ok(())
}
