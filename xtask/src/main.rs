//! Every chore of the project, one place: `cargo xtask --help`.

mod bench;
mod build;
mod conformance;
mod deb;
mod demo;
mod host;
mod kernel;
mod minihost;
mod needs;
mod rootfs;
mod tally;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

/// Every chore of rvm, one place.
///
/// The first run of anything takes minutes: Debian packages, the guest kernel, programs. Results are cached in
/// $RVM_CACHE (~/.cache/rvm unless set), outside the work tree, so the next run takes seconds.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Chore,
}

const EXAMPLES: &str = "Examples:
  cargo xtask demo                              a container in a microVM, from nothing
  cargo xtask demo walkthrough                  an API and its database with Docker, from Dockerfiles to the clean-up
  cargo xtask test                              everything that CI runs
  cargo xtask test --e2e -- network             the end-to-end tests whose names contain `network`
  cargo xtask host -- docker run --rm --runtime=rvm busybox uname -r
  cargo xtask host --shell                      look around in the test host
  cargo xtask conformance -- hostname           what runc and rvm make of the suites' tests of host names
  cargo xtask bench files                       how fast files are, beside runc
  cargo xtask minihost -- rvm check             the same kind of host, smaller and up in 5 seconds
  cargo xtask build --install                   rvm into /usr/local, to use it here";

#[derive(Subcommand)]
enum Chore {
    /// Show a container in a microVM: its output, both kernels, and the timeline of its start
    Demo(demo::DemoArgs),
    /// Run all tests: formatting, clippy, unit tests, and the end-to-end suites in the test host
    Test(test::TestArgs),
    /// Run the quick ones of the tests: formatting, clippy, unit tests
    Check,
    /// Run a command in the test host: Debian with KVM, Docker, containerd, podman and rvm
    Host(host::HostArgs),
    /// Run the OCI conformance suites of runtime-tools and youki against rvm and runc, in the test host
    Conformance(conformance::ConformanceArgs),
    /// Measure rvm beside runc, in the test host
    Bench(bench::BenchArgs),
    /// Build the guest kernel, and print where it is
    Kernel,
    /// Build rvm, its agent, its kernel and the end-to-end suites, and print the directory that holds them
    Build {
        /// Install rvm, agent and kernel below /usr/local, or wherever --prefix says, instead
        #[arg(long)]
        install: bool,
        /// Where to install to
        #[arg(long, default_value = "/usr/local", requires = "install")]
        prefix: PathBuf,
    },
    /// Run a command in a small software host that has KVM, busybox and rvm, but no engine
    Minihost(MinihostArgs),
}

#[derive(Args)]
struct MinihostArgs {
    /// Take along a file or directory of this machine, as /add/NAME
    #[arg(long, value_name = "PATH")]
    add: Vec<PathBuf>,
    /// Use rvm as it was built last, without building it
    #[arg(long)]
    no_build: bool,
    /// Show what the small host's kernel prints
    #[arg(long)]
    console: bool,
    /// Memory of the small host, in MiB
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// Give up after so many seconds
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let path = needs::search_path(&std::env::var_os("PATH").unwrap_or_default());
    // SAFETY: this is the first statement of the program: no other thread reads the environment yet.
    unsafe { std::env::set_var("PATH", path) };
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(chore: Chore) -> Result<ExitCode> {
    match chore {
        Chore::Demo(args) => return demo::run(&args),
        Chore::Test(args) => return Ok(test::run(&args)),
        Chore::Check => return Ok(test::check()),
        Chore::Host(args) => return host::run(args),
        Chore::Conformance(args) => return conformance::run(&args),
        Chore::Bench(args) => return bench::run(&args),
        Chore::Kernel => println!("{}", kernel::vmlinux()?.display()),
        Chore::Build { install: true, prefix } => build::install_below(&prefix)?,
        Chore::Build { .. } => println!("{}", build::with_suites()?.display()),
        Chore::Minihost(args) => return minihost(&args),
    }
    Ok(ExitCode::SUCCESS)
}

fn minihost(args: &MinihostArgs) -> Result<ExitCode> {
    let artefacts = if args.no_build { build::directory()? } else { build::artefacts()? };
    let status = minihost::run(&minihost::Job {
        command: &args.command,
        add: &args.add,
        artefacts: &artefacts,
        memory_mib: args.memory,
        show_console: args.console,
        timeout: Duration::from_secs(args.timeout),
    })?;
    Ok(ExitCode::from(status))
}
