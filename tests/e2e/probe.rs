//! What stories run inside of containers where a shell is too slow, or sees too little: this same program, under another
//! name.

use std::fs;
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::bundle::Bundle;
use crate::templates::{clocks, clones};

/// Where it is in the container, and by what it is told from the suites.
const PROGRAM: &str = "/probe";

/// A bundle whose first process looks at something.
pub fn bundle(what: &str) -> Result<Bundle> {
    let bundle = Bundle::new(&[PROGRAM, what])?;
    let place = Path::new(bundle.path()).join("rootfs").join(PROGRAM.trim_start_matches('/'));
    fs::copy("/proc/self/exe", place).context("this program can be copied")?;
    Ok(bundle)
}

/// Does what is asked for when this program is called by that name.
pub fn run_if_called() -> Option<ExitCode> {
    let mut words = std::env::args();
    words.next().filter(|name| name == PROGRAM)?;
    let done = match words.next().unwrap_or_default().as_str() {
        "clock" => tell_time(),
        "identity" => clones::tell_identity(),
        other => Err(anyhow::anyhow!("there is no probe called {other:?}")),
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:?}");
            ExitCode::FAILURE
        }
    })
}

/// Tells the time at once, and again for each line that comes.
fn tell_time() -> Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "{}", clocks::Reading::now()?)?;
    for line in io::stdin().lock().lines() {
        line?;
        writeln!(output, "{}", clocks::Reading::now()?)?;
    }
    Ok(())
}
