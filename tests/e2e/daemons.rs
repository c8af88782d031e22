//! Docker daemons that are set up in other ways: rvm for everything, builds included, and users that are mapped.

use std::fs;

use anyhow::{Result, ensure};

use crate::Story;
use crate::command::{ensure_guest_kernel, shell};
use crate::daemon::Daemon;

pub const STORIES: &[(&str, Story)] = &[
    ("a_dockerfile_builds_in_microvms", a_dockerfile_builds_in_microvms),
    ("mapped_users_are_mapped_in_the_guest", mapped_users_are_mapped_in_the_guest),
];

fn a_dockerfile_builds_in_microvms() -> Result<()> {
    let daemon = Daemon::start(&["--default-runtime", "rvm"])?;
    let folder = tempfile::tempdir()?;
    let dockerfile = "FROM busybox\nWORKDIR /srv\nADD page.html .\nENV GREETING=hello\n\
                      RUN uname -r > kernel && mkdir made && chown 7:8 made\nEXPOSE 80\n\
                      CMD [\"sh\", \"-c\", \"echo $GREETING; cat page.html kernel; stat -c '%u %g' made\"]\n";
    fs::write(folder.path().join("Dockerfile"), dockerfile)?;
    fs::write(folder.path().join("page.html"), "<p>page</p>\n")?;
    let path = folder.path().display().to_string();
    let build = format!("DOCKER_BUILDKIT=0 docker -H {} build -t tutorial {path}", daemon.address());
    shell(&build)?.expect_code(0)?;
    let seen = daemon.docker(&["run", "--rm", "tutorial"])?.expect_code(0)?.text();
    let lines: Vec<_> = seen.lines().collect();
    let [greeting, page, kernel, owner] = lines[..] else { anyhow::bail!("the image printed {seen}") };
    ensure!((greeting, page, owner) == ("hello", "<p>page</p>", "7 8"), "the image printed {seen}");
    ensure_guest_kernel(kernel)?;
    let ports = daemon.docker(&["inspect", "-f", "{{.Config.ExposedPorts}}", "tutorial"])?;
    ports.expect_text("map[80/tcp:{}]")
}

fn mapped_users_are_mapped_in_the_guest() -> Result<()> {
    // What `adduser` would do for Docker's default user of mappings.
    let user = "grep -q ^dockremap: /etc/passwd || echo dockremap:x:990:990::/:/bin/false >>/etc/passwd; \
                grep -q ^dockremap: /etc/group || echo dockremap:x:990: >>/etc/group; \
                for f in /etc/subuid /etc/subgid; do \
                grep -q ^dockremap: $f 2>/dev/null || echo dockremap:200000:65536 >>$f; done";
    shell(user)?.expect_code(0)?;
    let daemon = Daemon::start(&["--userns-remap", "default"])?;
    let folder = tempfile::tempdir()?;
    shell(&format!("chmod 777 {}", folder.path().display()))?.expect_code(0)?;
    let volume = format!("{}:/x", folder.path().display());
    let script = "id -u; tr -s ' ' </proc/self/uid_map; stat -c '%u %g' / /etc/passwd /x; echo made >/x/made; \
                  stat -c '%u %g' /x/made; touch /in-root && chown 5:6 /in-root && stat -c '%u %g' /in-root; \
                  hostname other 2>&1; mount -t tmpfs none /mnt 2>&1; echo $?";
    let mut seen = Vec::new();
    for runtime in ["runc", "rvm"] {
        let _ = fs::remove_file(folder.path().join("made"));
        let words = ["run", "--rm", "--runtime", runtime, "--hostname", "kitchen", "-v", &volume];
        let told =
            daemon.docker(&[&words[..], &["busybox", "sh", "-c", script]].concat())?.expect_code(0)?.text();
        let owner = shell(&format!("stat -c '%u %g' {}/made", folder.path().display()))?.text();
        ensure!(owner == "200000 200000", "under {runtime} the host sees the owner {owner}");
        seen.push(told);
    }
    ensure!(seen[0] == seen[1], "under runc:\n{}\nunder rvm:\n{}", seen[0], seen[1]);
    Ok(())
}
