//! Real programs in the debian image: what people run in containers.

use anyhow::{Context, Result, ensure};
use sha2::Digest;

use crate::Story;
use crate::command::{docker, docker_run, docker_start, empty_engines, eventually, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("python_computes", python_computes),
    ("dpkg_and_apt_install_and_remove", dpkg_and_apt_install_and_remove),
    ("gcc_compiles_and_the_program_runs", gcc_compiles_and_the_program_runs),
    ("postgresql_keeps_its_data_on_a_volume", postgresql_keeps_its_data_on_a_volume),
];

fn python_computes() -> Result<()> {
    let program = "import hashlib, os, threading\n\
                   results = []\n\
                   threads = [threading.Thread(target=lambda n=n: results.append(n * n)) for n in range(4)]\n\
                   [t.start() for t in threads]; [t.join() for t in threads]\n\
                   open('/tmp/x', 'w').write('y' * 100000)\n\
                   print(sorted(results), os.stat('/tmp/x').st_size, hashlib.sha256(b'rvm').hexdigest()[:8])";
    let shown = docker_run(&["debian", "python3", "-c", program])?.expect_code(0)?.text();
    let digest: String = sha2::Sha256::digest(b"rvm").iter().map(|byte| format!("{byte:02x}")).collect();
    let expected = &digest[..8];
    ensure!(shown == format!("[0, 1, 4, 9] 100000 {expected}"), "{shown}");
    Ok(())
}

fn dpkg_and_apt_install_and_remove() -> Result<()> {
    let line = "mkdir -p /p/DEBIAN /p/usr/bin && cd / && \
                printf 'Package: story\\nVersion: 1\\nArchitecture: all\\nMaintainer: A <a@b.test>\\nDescription: d\\n' \
                > /p/DEBIAN/control && printf '#!/bin/sh\\necho installed\\n' > /p/usr/bin/story && \
                chmod 755 /p/usr/bin/story && dpkg-deb -b /p /story.deb >/dev/null && \
                dpkg -i /story.deb >/dev/null && story && dpkg -s story | grep -q 'ok installed' && \
                apt-get -qq check && dpkg -r story >/dev/null && test ! -e /usr/bin/story && echo removed && \
                apt-get -qq install /story.deb >/dev/null 2>&1 && story && \
                apt-get -qq remove story >/dev/null 2>&1 && test ! -e /usr/bin/story && echo removed";
    docker_run(&["--network", "none", "debian", "sh", "-c", line])?
        .expect_text("installed\nremoved\ninstalled\nremoved")
}

fn gcc_compiles_and_the_program_runs() -> Result<()> {
    let line = "printf '#include <stdio.h>\\nint main(void) { puts(\"compiled\"); return 0; }\\n' > /x.c && \
                gcc -O1 -o /x /x.c && /x";
    docker_run(&["debian", "sh", "-c", line])?.expect_text("compiled")
}

fn postgresql_keeps_its_data_on_a_volume() -> Result<()> {
    shell("docker volume create story-data")?.expect_code(0)?;
    let outcome = database_lives_twice();
    empty_engines();
    let freed = eventually("the volume is free", || Ok(docker(&["volume", "rm", "story-data"])?.code == 0));
    outcome.and(freed)
}

/// What the database's container says of itself.
fn log(id: &str) -> String {
    let line = format!("docker logs --tail 20 {id} 2>&1; docker inspect -f '{{{{.State.Status}}}}' {id}");
    shell(&line).map_or_else(|error| error.to_string(), |outcome| outcome.text())
}

/// The log is asked, and not the database: that takes processor time from its preparation, which is long.
fn wait_until_ready(id: &str) -> Result<()> {
    let ready = "ready to accept connections";
    eventually("the database is ready", || Ok(docker(&["logs", id])?.error_text().contains(ready)))
        .with_context(|| log(id))
}

fn database_lives_twice() -> Result<()> {
    let prepare = "chown postgres /data && cd / && pg=$(ls -d /usr/lib/postgresql/*/bin) && \
                   { test -s /data/PG_VERSION || setpriv --reuid postgres --regid postgres --clear-groups \
                   $pg/initdb -D /data -A trust --no-sync >/dev/null; } && mkdir -p /run/postgresql && \
                   chown postgres /run/postgresql && exec setpriv --reuid postgres --regid postgres --clear-groups \
                   $pg/postgres -D /data";
    let start = || docker_start(&["-v", "story-data:/data", "debian", "sh", "-c", prepare]);
    let ask = |id: &str, statement: &str| {
        docker(&["exec", id, "psql", "-U", "postgres", "-h", "/run/postgresql", "-Atc", statement])
    };

    let first = start()?;
    wait_until_ready(&first)?;
    ask(&first, "create table t (n int)")?.expect_code(0)?;
    ask(&first, "insert into t select generate_series(1, 1000)")?.expect_code(0)?;
    docker(&["stop", "-t", "60", &first])?.expect_code(0)?;
    docker(&["wait", &first])?.expect_text("0")?;
    docker(&["rm", &first])?.expect_code(0)?;

    let second = start()?;
    wait_until_ready(&second)?;
    ask(&second, "select count(*), sum(n) from t")?.expect_text("1000|500500")?;
    docker(&["rm", "-f", &second])?.expect_code(0).map(drop)
}
