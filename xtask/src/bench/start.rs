//! `cargo xtask bench start`: how long starts and `exec` take beside other runtimes, and what they take that does not depend
//! on how fast the machine is.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use rvm_tests::host::{Host, Suite as Turn};
use rvm_tests::support::process;
use serde_json::{Value, json};

use crate::build;

/// How often to measure, and where the figures go.
#[derive(Debug, clap::Args)]
pub struct StartArgs {
    /// Start a container of each runtime so many times
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Write the figures and counts to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with plots to FILE
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Counts, with the bundles that the other script makes in a folder of its own.
const COUNT: &str = include_str!("../../../tests/counts/count");
const BUNDLES: &str = r##"
set -e
work=$(mktemp -d)
trap 'rm -rf "$work"; ip netns delete rvm-bench || true' EXIT
cd "$work"
mkdir -p short/rootfs/bin cold long network
cp "$(command -v busybox)" short/rootfs/bin/busybox
ln -s busybox short/rootfs/bin/true
ln -s busybox short/rootfs/bin/sleep
rvm spec --bundle short
sed -i 's/"terminal": true/"terminal": false/; s/"sh"/"true"/; s#"rootfs"#"'"$work"'/short/rootfs"#' short/config.json
sed 's/"ociVersion"/"annotations": { "dev.rvm.template": "off" }, "ociVersion"/' short/config.json >cold/config.json
sed 's/"true"$/"sleep", "1000"/' short/config.json >long/config.json
ip netns add rvm-bench
ip -n rvm-bench link add eth0 type veth peer name far
ip -n rvm-bench link set eth0 up
ip -n rvm-bench address add 10.82.0.2/24 dev eth0
sed 's#"type": "network"#"type": "network", "path": "/run/netns/rvm-bench"#' short/config.json >network/config.json
sh -c "$1" count short cold long network
"##;
/// Where the test host keeps the page.
const PAGE: &str = "/root/compared.html";

/// Runs the chore.
pub fn run(args: &StartArgs) -> Result<ExitCode> {
    rvm_tests::host::may_make_image()?;
    let turn = Turn::begin()?;
    build::artefacts()?;
    let host = Host::ensure()?;
    let counts = process::text(&mut host.command(["sh", "-c", BUNDLES, "bench", COUNT]))?;
    let counts: Value = serde_json::from_str(&counts).context("the counts are no JSON")?;
    let rounds = args.rounds.to_string();
    let words = ["rvm", "compare", "-n", &rounds, "--format", "json", "--report", PAGE];
    let compared: Value = serde_json::from_str(&process::text(&mut host.command(words))?)
        .context("the comparison is no JSON")?;
    let text = serde_json::to_string_pretty(&json!({ "counts": counts, "comparison": compared }))?;
    match &args.json {
        Some(path) => fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?,
        None => println!("{text}"),
    }
    if let Some(path) = &args.report {
        let page = process::text(&mut host.command(["cat", PAGE]))?;
        fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    drop(turn);
    Ok(ExitCode::SUCCESS)
}
