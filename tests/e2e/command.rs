//! Running programs the way a user at a shell does, with words for what went wrong.

use std::io::{Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long any command may take before it counts as hanging, and any change before it counts as failed. Far above what the slowest host needs.
const PATIENCE: Duration = Duration::from_secs(480);

/// What a program left: its output and its exit code (128 and the signal's number when a signal ended it).
#[derive(Debug)]
pub struct Outcome {
    pub command: String,
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Outcome {
    /// Standard output as text, without the last newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end_matches(['\n', '\r']).to_owned()
    }

    /// Standard error as text.
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Fails unless the program ended with this code.
    pub fn expect_code(self, code: i32) -> Result<Outcome> {
        ensure!(
            self.code == code,
            "`{}` ended with {} instead of {code}\nstdout: {}\nstderr: {}",
            self.command,
            self.code,
            self.text(),
            self.error_text()
        );
        Ok(self)
    }

    /// Fails unless the program succeeded with exactly this text.
    pub fn expect_text(self, text: &str) -> Result<()> {
        let outcome = self.expect_code(0)?;
        ensure!(
            outcome.text() == text,
            "`{}` printed {:?} instead of {text:?}\nstderr: {}",
            outcome.command,
            outcome.text(),
            outcome.error_text()
        );
        Ok(())
    }

    /// Fails unless the program failed with a message that holds all these words.
    pub fn expect_failure(self, words: &[&str]) -> Result<Outcome> {
        ensure!(self.code != 0, "`{}` succeeded but had to fail: {}", self.command, self.text());
        let message = self.error_text();
        for word in words {
            ensure!(message.contains(word), "`{}` failed without saying {word:?}: {message}", self.command);
        }
        Ok(self)
    }
}

/// Runs a program to its end without input.
pub fn run(program: &str, arguments: &[&str]) -> Result<Outcome> {
    run_with_input(program, arguments, &[])
}

/// Runs a program to its end with this on its standard input.
pub fn run_with_input(program: &str, arguments: &[&str], input: &[u8]) -> Result<Outcome> {
    let mut command = Command::new(program);
    command.args(arguments);
    finish(command, input)
}

/// Runs a prepared command to its end with this on its standard input.
pub fn finish(mut command: Command, input: &[u8]) -> Result<Outcome> {
    command.stdin(Stdio::piped());
    let input = input.to_vec();
    complete(command, |child| {
        let mut stdin = child.stdin.take().context("the child has a standard input")?;
        // A program that ends before it has read everything breaks the pipe, which is its right.
        thread::spawn(move || {
            let _ = stdin.write_all(&input);
        });
        Ok(())
    })
}

/// Runs a prepared command, whose standard input is set, to its end.
pub fn finish_as_it_is(command: Command) -> Result<Outcome> {
    complete(command, |_| Ok(()))
}

/// A command as one would type it.
fn words(command: &Command) -> String {
    format!("{command:?}").replace('"', "")
}

fn complete(mut command: Command, feed: impl FnOnce(&mut Child) -> Result<()>) -> Result<Outcome> {
    let words = words(&command);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("`{words}` could not be started"))?;
    let watchdog = Watchdog::start(child.id());
    feed(&mut child)?;
    let output = child.wait_with_output()?;
    watchdog.stop(&words)?;
    Ok(Outcome {
        command: words,
        code: exit_code(output.status),
        stdout: output.stdout,
        stderr: output.stderr,
    })
}

/// Waits for a program that a story started; one that hangs is a failure.
pub fn wait_for(child: &mut Child, what: &str) -> Result<ExitStatus> {
    let watchdog = Watchdog::start(child.id());
    let status = child.wait()?;
    watchdog.stop(what)?;
    Ok(status)
}

/// The exit code as a shell tells it.
pub fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Ends a program that hangs, so that one failure does not stop all that follow.
struct Watchdog {
    done: std::sync::mpsc::Sender<()>,
    thread: thread::JoinHandle<bool>,
}

impl Watchdog {
    /// Watches the leader of a process group.
    fn start(leader: u32) -> Watchdog {
        let (done, wait) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let hung = wait.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if hung {
                // Monitors and stubs lead sessions of their own and hold the pipes of whoever started them.
                let end = format!("kill -KILL -{leader} {leader}; pkill -KILL -f '^rvm: '");
                let _ = Command::new("sh").args(["-c", &end]).stderr(Stdio::null()).status();
            }
            hung
        });
        Watchdog { done, thread }
    }

    fn stop(self, what: &str) -> Result<()> {
        let _ = self.done.send(());
        let hung = self.thread.join().unwrap_or(true);
        ensure!(!hung, "`{what}` did not end within {} s", PATIENCE.as_secs());
        Ok(())
    }
}

/// `docker` with these arguments.
pub fn docker(arguments: &[&str]) -> Result<Outcome> {
    run("docker", arguments)
}

/// `docker run --rm --runtime=rvm` with these arguments.
pub fn docker_run(arguments: &[&str]) -> Result<Outcome> {
    docker(&[&["run", "--rm", "--runtime=rvm"], arguments].concat())
}

/// `rvm` with these arguments.
pub fn rvm(arguments: &[&str]) -> Result<Outcome> {
    run("rvm", arguments)
}

/// `rvm` with these arguments, which leaves a container running. That one has its error stream, so this is no pipe: nothing
/// would end it.
pub fn rvm_detached(arguments: &[&str]) -> Result<()> {
    let mut errors = tempfile::tempfile()?;
    let mut command = Command::new("rvm");
    command.args(arguments).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors.try_clone()?);
    let words = words(&command);
    let status = wait_for(&mut command.spawn()?, &words)?;
    let mut said = String::new();
    errors.rewind()?;
    errors.read_to_string(&mut said)?;
    ensure!(status.success(), "`{words}` ended with {}\nstderr: {said}", exit_code(status));
    Ok(())
}

/// A line of shell, on the host.
pub fn shell(line: &str) -> Result<Outcome> {
    run("sh", &["-c", line])
}

/// One of the figures that KVM has about the machine of a monitor.
pub fn kvm_figure(monitor: &str, name: &str) -> Result<i64> {
    let look = format!(
        "dir=$(mktemp -d) && mount -t debugfs none $dir && cat $dir/kvm/{monitor}-*/{name}; umount $dir && rmdir $dir"
    );
    let told = shell(&look)?.expect_code(0)?.text();
    told.trim().parse().with_context(|| format!("{name} of {monitor} is {told:?}"))
}

/// Starts a container in the background and returns its ID.
pub fn docker_start(arguments: &[&str]) -> Result<String> {
    let outcome = docker(&[&["run", "-d", "--runtime=rvm"], arguments].concat())?.expect_code(0)?;
    Ok(outcome.text())
}

/// Asks until the answer satisfies, for things that engines do in the background.
pub fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if holds()? {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
    bail!("it never came true that {what}")
}

/// Starts a program in the background, with pipes for its streams.
pub fn spawn(program: &str, arguments: &[&str]) -> Result<Child> {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("`{program}` could not be started"))
}

/// Fails unless this is what `uname -r` prints in a guest.
pub fn ensure_guest_kernel(release: &str) -> Result<()> {
    let host = shell("uname -r")?.expect_code(0)?.text();
    ensure!(
        release.starts_with("6.12.") && release.ends_with("-rvm") && release != host,
        "{release:?} is not the guest's kernel; the host's is {host:?}"
    );
    Ok(())
}

/// Has the engines remove whatever containers a story left in them. What rvm itself keeps is not touched: after this,
/// there is to be nothing.
pub fn empty_engines() {
    let _ = shell("docker ps -aq | xargs -r docker rm -f -v");
    let _ = shell("podman ps -aq | xargs -r podman rm -f -t 0");
    let _ = shell(
        "ctr tasks ls -q | xargs -r -n 1 ctr tasks rm -f; ctr containers ls -q | xargs -r ctr containers rm",
    );
}

/// Removes what a failed story left, so that the next one starts from nothing.
pub fn remove_remains() {
    let _ = shell(
        "for r in rvm runc; do $r list --quiet | xargs -r -n 1 $r delete --force; done; pkill -KILL -f '^rvm: '",
    );
}
