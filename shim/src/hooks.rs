//! Hooks: programs of the engine that run on the host at fixed points of a container's life (OCI spec, `hooks`).

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::Hook;

use crate::cause::Cause;
use crate::container::liveness::pidfd_open;

/// The most that is kept of what a hook writes to its standard error.
const MAX_STDERR: usize = 64 << 10;

/// A point in a container's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookKind {
    /// During create, once the namespaces exist. Deprecated; what dockerd up to 27 plumbs networks with.
    Prestart,
    /// During create, once the namespaces exist.
    CreateRuntime,
    /// During create, before the root is changed.
    CreateContainer,
    /// During start, inside the container.
    StartContainer,
    /// After the container's process was started.
    Poststart,
    /// After the container was deleted.
    Poststop,
}

impl HookKind {
    /// Whether the failure of one of these hooks ends the container, so that no more of them are called.
    fn failure_is_final(self) -> bool {
        self != HookKind::Poststop
    }
}

impl fmt::Display for HookKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            HookKind::Prestart => "prestart",
            HookKind::CreateRuntime => "createRuntime",
            HookKind::CreateContainer => "createContainer",
            HookKind::StartContainer => "startContainer",
            HookKind::Poststart => "poststart",
            HookKind::Poststop => "poststop",
        })
    }
}

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// Its program could not be started.
    #[error("{kind} hook {program} could not be started: {cause}")]
    Start {
        /// When it was to run.
        kind: HookKind,
        /// Its program.
        program: String,
        /// Why.
        cause: Cause,
    },
    /// It could not be watched.
    #[error("{kind} hook {program} was lost: {cause}")]
    Lost {
        /// When it ran.
        kind: HookKind,
        /// Its program.
        program: String,
        /// Why.
        cause: Cause,
    },
    /// It ended with an error.
    #[error("{kind} hook {program} failed with {status}{stderr}")]
    Failed {
        /// When it ran.
        kind: HookKind,
        /// Its program.
        program: String,
        /// How it ended, in words.
        status: String,
        /// What it wrote, introduced by a colon.
        stderr: String,
    },
    /// It took longer than its timeout, and was killed.
    #[error("{kind} hook {program} was killed: it took longer than its timeout of {seconds} s{stderr}")]
    TimedOut {
        /// When it ran.
        kind: HookKind,
        /// Its program.
        program: String,
        /// Its timeout.
        seconds: u64,
        /// What it wrote, introduced by a colon.
        stderr: String,
    },
}

/// Runs hooks in order, each with the container's state on its standard input.
///
/// The first failure ends the row, except after the deletion: there the others run too, and the first failure is
/// returned for a warning.
pub fn run(kind: HookKind, hooks: &[Hook], state_json: &str) -> Result<(), HookError> {
    let mut first_failure = Ok(());
    for hook in hooks {
        let result = run_one(kind, hook, state_json);
        if result.is_err() && kind.failure_is_final() {
            return result;
        }
        first_failure = first_failure.and(result);
    }
    first_failure
}

fn run_one(kind: HookKind, hook: &Hook, state_json: &str) -> Result<(), HookError> {
    let program = hook.path().display().to_string();
    let mut child = command(hook).spawn().map_err(|error| HookError::Start {
        kind,
        program: program.clone(),
        cause: error.into(),
    })?;
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
    let outcome = attend(&mut child, state_json.as_bytes(), limit.map(Duration::from_secs));
    let (end, stderr) = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            end_it(&mut child);
            return Err(HookError::Lost { kind, program, cause: error.into() });
        }
    };
    let stderr = match String::from_utf8_lossy(&stderr).trim() {
        "" => String::new(),
        text => format!(": {text}"),
    };
    match (end, limit) {
        (Some(status), _) if status.success() => Ok(()),
        (Some(status), _) => Err(HookError::Failed { kind, program, status: in_words(status), stderr }),
        (None, seconds) => {
            Err(HookError::TimedOut { kind, program, seconds: seconds.unwrap_or_default(), stderr })
        }
    }
}

fn command(hook: &Hook) -> Command {
    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(rest);
    }
    // As with runc, a hook without an environment of its own has that of the caller.
    if let Some(variables) = hook.env() {
        command.env_clear().envs(variables.iter().filter_map(|variable| variable.split_once('=')));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Feeds and hears the hook until it ends; no status means that it was killed for taking too long.
///
/// The hook's end counts, not that of its standard error, which a daemon that it left behind may hold open.
fn attend(
    child: &mut Child,
    state: &[u8],
    limit: Option<Duration>,
) -> io::Result<(Option<ExitStatus>, Vec<u8>)> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    let ended = pidfd_open(child.id().cast_signed())?;
    let mut stdin = Input { pipe: child.stdin.take(), rest: state };
    let mut stderr = Output { pipe: child.stderr.take(), bytes: Vec::new() };
    stdin.prepare()?;
    stderr.prepare()?;
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            end_it(child);
            stderr.take()?;
            return Ok((None, stderr.bytes));
        }
        if wait(ended.as_fd(), &stdin, &stderr, left)? {
            stderr.take()?;
            return Ok((Some(child.wait()?), stderr.bytes));
        }
        stdin.give()?;
        stderr.take()?;
    }
}

/// Waits until there is something to do; whether the hook has ended.
fn wait(
    ended: BorrowedFd<'_>,
    stdin: &Input<'_>,
    stderr: &Output,
    left: Option<Duration>,
) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(ended, PollFlags::POLLIN)];
    fds.extend(stdin.pipe.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)));
    fds.extend(stderr.pipe.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
    // A deadline beyond poll's range is looked at again when that time is over.
    let timeout = match left {
        Some(left) => PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
        None => PollTimeout::NONE,
    };
    match poll(&mut fds, timeout) {
        Ok(_) => Ok(fds[0].any().unwrap_or(true)),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

struct Input<'a> {
    pipe: Option<ChildStdin>,
    rest: &'a [u8],
}

impl Input<'_> {
    fn prepare(&mut self) -> io::Result<()> {
        self.pipe.as_ref().map_or(Ok(()), |pipe| unblock(pipe.as_fd()))
    }

    fn give(&mut self) -> io::Result<()> {
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
        match pipe.write(self.rest) {
            Ok(count) => self.rest = &self.rest[count..],
            Err(error) if would_block(&error) => return Ok(()),
            // A hook need not read the state.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.rest = &[],
            Err(error) => return Err(error),
        }
        if self.rest.is_empty() {
            self.pipe = None;
        }
        Ok(())
    }
}

struct Output {
    pipe: Option<ChildStderr>,
    bytes: Vec<u8>,
}

impl Output {
    fn prepare(&mut self) -> io::Result<()> {
        self.pipe.as_ref().map_or(Ok(()), |pipe| unblock(pipe.as_fd()))
    }

    /// Takes what is there. Past the limit it is read and thrown away, so that the hook does not block.
    fn take(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(count) => {
                    let room = MAX_STDERR.saturating_sub(self.bytes.len());
                    self.bytes.extend_from_slice(&buffer[..count.min(room)]);
                }
                Err(error) if would_block(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn unblock(pipe: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(pipe, FcntlArg::F_GETFL)?);
    fcntl(pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Kills and reaps the hook; one that has ended meanwhile is only reaped.
fn end_it(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown status".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Hook {
        let mut hook = Hook::default();
        hook.set_path("/bin/sh".into());
        hook.set_args(Some(vec!["sh".into(), "-c".into(), script.into()]));
        hook.set_env(Some(vec!["PATH=/usr/bin:/bin".into(), "GREETING=hello".into()]));
        hook
    }

    #[test]
    fn a_hook_gets_state_arguments_and_environment() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("out");
        let script = format!("{{ echo $GREETING; cat; }} > {}", file.display());
        run(HookKind::Prestart, &[shell(&script)], "{\"id\":\"x\"}").unwrap();
        assert_eq!(std::fs::read_to_string(file).unwrap(), "hello\n{\"id\":\"x\"}");
    }

    #[test]
    fn a_state_larger_than_a_pipe_arrives() {
        let state = "x".repeat(1 << 20);
        run(HookKind::Prestart, &[shell("test $(wc -c) = 1048576")], &state).unwrap();
    }

    #[test]
    fn a_hook_need_not_read_its_input() {
        run(HookKind::Prestart, &[shell("exec 0<&-; sleep 0.05")], &"x".repeat(1 << 20)).unwrap();
    }

    #[test]
    fn a_failure_carries_code_and_words_and_stops_the_row() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ran");
        let hooks = [shell("echo no bridge >&2; exit 3"), shell(&format!("touch {}", file.display()))];
        for kind in [HookKind::CreateRuntime, HookKind::Poststart] {
            let error = run(kind, &hooks, "{}").unwrap_err().to_string();
            assert_eq!(error, format!("{kind} hook /bin/sh failed with exit code 3: no bridge"));
            assert!(!file.exists());
        }
        let error = run(HookKind::Poststop, &hooks, "{}").unwrap_err().to_string();
        assert!(error.starts_with("poststop hook"), "{error}");
        assert!(file.exists(), "after delete the others run all the same");
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed() {
        let mut hook = shell("echo waiting >&2; exec sleep 1000");
        hook.set_timeout(Some(1));
        let error = run(HookKind::Prestart, &[hook], "{}").unwrap_err();
        assert!(matches!(error, HookError::TimedOut { seconds: 1, .. }), "{error}");
    }

    #[test]
    fn a_daemon_left_behind_does_not_hold_the_hook_up() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // The daemon inherits stderr and ends when the test opens the pipe.
        run(HookKind::Prestart, &[shell(&format!("cat {} >&2 & exit 0", fifo.display()))], "{}").unwrap();
        std::fs::write(&fifo, "done").unwrap();
    }

    #[test]
    fn noise_is_cut_and_does_not_block() {
        let error = run(HookKind::Prestart, &[shell("yes | head -c 1000000 >&2; exit 1")], "{}").unwrap_err();
        match error {
            HookError::Failed { stderr, .. } => assert!(stderr.len() <= MAX_STDERR + 2, "{}", stderr.len()),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_missing_program_is_no_missing_container() {
        let mut hook = Hook::default();
        hook.set_path("/nowhere/at-all".into());
        let error = run(HookKind::Prestart, &[hook], "{}").unwrap_err().to_string();
        assert_eq!(error, "prestart hook /nowhere/at-all could not be started: nothing is there (ENOENT)");
    }
}
