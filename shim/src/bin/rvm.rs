//! The `rvm` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    rvm::commands::main()
}
