//! `startContainer` hooks: programs of the container that run in it right before its first process.
//!
//! All other hooks run on the host, before or after the guest has anything to do with them. What a hook prints is no
//! output of the container's: its errors go into the message if it fails, the rest nowhere.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{self, FcntlArg, OFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{self, SigHandler, Signal};
use nix::unistd::Pid;
use oci_spec::runtime::Hook;
use serde_json::Value;

use super::Container;
use crate::error::{Context, Result, other};
use crate::process::environment::Environment;
use crate::sys::process::open_process;

/// Of what a hook prints to its standard error, so much is kept: the end of it.
const MAX_ERRORS: usize = 2 << 10;
/// How often a hook's end is looked for where the kernel, or a filter, gives no descriptor to wait for it.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Runs the hooks, in the calling process's namespaces and with its identity. The first that fails ends it.
pub fn run_start_container(container: &Container, environment: &Environment) -> Result<()> {
    let hooks = container.spec.hooks().as_ref().and_then(|hooks| hooks.start_container().as_deref());
    let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else { return Ok(()) };
    let state = state(container)?;
    // A hook may end without reading its input, which must not end this process. The hook itself gets the default.
    handle_broken_pipes(SigHandler::SigIgn)?;
    hooks.iter().try_for_each(|hook| run(hook, &state, environment))?;
    handle_broken_pipes(SigHandler::SigDfl)
}

fn handle_broken_pipes(handler: SigHandler) -> Result<()> {
    // SAFETY: neither of the two dispositions runs code of this process.
    unsafe { signal::signal(Signal::SIGPIPE, handler) }.map(drop).context(|| "setting what SIGPIPE does")
}

/// The container's state as the host tells it, with the process id as the container sees it, and by now
/// created.
fn state(container: &Container) -> Result<String> {
    let mut state: Value =
        serde_json::from_str(&container.hook_state).context(|| "the state for the container's hooks")?;
    if let Some(fields) = state.as_object_mut() {
        fields.insert("pid".to_owned(), std::process::id().into());
        fields.insert("status".to_owned(), "created".into());
    }
    Ok(state.to_string())
}

fn run(hook: &Hook, state: &str, environment: &Environment) -> Result<()> {
    let name = hook.path().display();
    let mut command = Command::new(hook.path());
    if let Some((first, rest)) = hook.args().as_deref().and_then(<[_]>::split_first) {
        command.arg0(first).args(rest);
    }
    // As with runc, a hook without an environment of its own has that of the process for which it runs.
    let variables = hook.env().as_deref().unwrap_or(environment.variables());
    let variables = variables.iter().filter_map(|variable| variable.split_once('='));
    command.env_clear().envs(variables).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().context(|| format!("running the startContainer hook {name}"))?;
    // The specification knows no limit of zero.
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let mut attendant = Attendant::new(child, state.as_bytes().to_vec());
    let status = attendant
        .attend(limit.map(Duration::from_secs))
        .context(|| format!("waiting for the startContainer hook {name}"))?;
    let how = match status.map(|status| (status.code(), status.signal())) {
        Some((Some(0), _)) => return Ok(()),
        Some((Some(code), _)) => format!("failed with exit code {code}"),
        Some((None, signal)) => format!("was ended by signal {}", signal.unwrap_or_default()),
        None => "took too long".to_owned(),
    };
    let said = attendant.errors();
    let colon = if said.is_empty() { "" } else { ": " };
    Err(other(format!("the startContainer hook {name} {how}{colon}{said}")))
}

/// Feeds a hook and listens to it until it ends.
struct Attendant {
    child: Child,
    /// Readable when it has ended.
    descriptor: Option<OwnedFd>,
    input: Option<(ChildStdin, Vec<u8>)>,
    output: Option<ChildStdout>,
    error: Option<ChildStderr>,
    errors: Vec<u8>,
}

impl Attendant {
    fn new(mut child: Child, input: Vec<u8>) -> Self {
        Self {
            descriptor: open_process(pid(&child)).ok(),
            input: child.stdin.take().map(|stdin| (stdin, input)),
            output: child.stdout.take(),
            error: child.stderr.take(),
            errors: Vec::new(),
            child,
        }
    }

    /// Waits for the hook's end; `None` when it took too long, and was killed with all that it has started.
    fn attend(&mut self, limit: Option<Duration>) -> io::Result<Option<ExitStatus>> {
        for descriptor in self.pipes() {
            fcntl::fcntl(descriptor, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            // Before the pipes are read: what a hook that has ended had written is there then.
            let status = self.child.try_wait()?;
            self.exchange();
            if status.is_some() {
                return Ok(status);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                let _ = signal::killpg(pid(&self.child), Signal::SIGKILL);
                self.child.wait()?;
                return Ok(None);
            }
            self.wait(left);
        }
    }

    fn pipes(&self) -> Vec<BorrowedFd<'_>> {
        let pipes = [
            self.input.as_ref().map(|(stdin, _)| stdin.as_fd()),
            self.output.as_ref().map(AsFd::as_fd),
            self.error.as_ref().map(AsFd::as_fd),
        ];
        pipes.into_iter().flatten().collect()
    }

    fn wait(&self, left: Option<Duration>) {
        let left = match self.descriptor {
            Some(_) => left,
            None => Some(left.map_or(LOOK_AGAIN, |left| left.min(LOOK_AGAIN))),
        };
        // In milliseconds, rounded up.
        let left = left.map(|left| left.as_nanos().div_ceil(1_000_000).min(60_000) as u16);
        let mut waited: Vec<PollFd> =
            self.pipes().into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        if let (Some((stdin, _)), Some(first)) = (&self.input, waited.first_mut()) {
            *first = PollFd::new(stdin.as_fd(), PollFlags::POLLOUT);
        }
        waited.extend(self.descriptor.as_ref().map(|ended| PollFd::new(ended.as_fd(), PollFlags::POLLIN)));
        // If it fails, everything is looked at again.
        let _ = poll(&mut waited, left.map_or(PollTimeout::NONE, PollTimeout::from));
    }

    /// Moves what can be moved. A pipe that ends is closed, or its end would be told on and on.
    fn exchange(&mut self) {
        self.input.take_if(|(stdin, left)| match stdin.write(left) {
            Ok(count) => {
                left.drain(..count);
                left.is_empty()
            }
            // A hook need not read its input.
            Err(error) => !is_temporary(&error),
        });
        self.output.take_if(|pipe| read(pipe).is_none());
        let errors = &mut self.errors;
        self.error.take_if(|pipe| match read(pipe) {
            Some(bytes) => {
                errors.extend(bytes);
                errors.drain(..errors.len().saturating_sub(MAX_ERRORS));
                false
            }
            None => true,
        });
    }

    /// What it printed to its standard error, on one line.
    fn errors(&self) -> String {
        let text = String::from_utf8_lossy(&self.errors);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        lines.join("; ")
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id() as libc::pid_t)
}

/// As much as there is, up to the capacity of a pipe; `None` at its end.
fn read(pipe: &mut impl Read) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 64 << 10];
    match pipe.read(&mut bytes) {
        Ok(0) => None,
        Ok(count) => {
            bytes.truncate(count);
            Some(bytes)
        }
        Err(error) => is_temporary(&error).then(Vec::new),
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::HookBuilder;

    use super::*;

    fn shell(command: &str, timeout: i64) -> Result<()> {
        let arguments = ["sh", "-c", command].map(str::to_owned).to_vec();
        let hook = HookBuilder::default().path("/bin/sh").args(arguments).timeout(timeout).build().unwrap();
        run(&hook, "state", &Environment::of(&[]))
    }

    #[test]
    fn a_hooks_errors_are_told_when_it_fails() {
        let error = shell("echo out; echo first >&2; echo second >&2; exit 3", 60).unwrap_err();
        let expected = "the startContainer hook /bin/sh failed with exit code 3: first; second";
        assert_eq!(error.message, expected);
        assert!(shell("echo noise; echo noise >&2", 60).is_ok());
    }

    #[test]
    fn a_hook_may_print_much_and_leave_its_input_alone() {
        assert!(shell("exec 0<&-; head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2", 60).is_ok());
        let error = shell("head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1", 60).unwrap_err();
        assert!(error.message.len() < MAX_ERRORS + 100, "{}", error.message.len());
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed_with_all_that_it_has_started() {
        let (mut reader, writer) = io::pipe().unwrap();
        // Only those who are killed close this descriptor, by which the test sees it.
        fcntl::fcntl(&writer, FcntlArg::F_SETFD(fcntl::FdFlag::empty())).unwrap();
        let error = shell("trap '' ALRM; sleep 1000 & wait", 1).unwrap_err();
        assert_eq!(error.message, "the startContainer hook /bin/sh took too long");
        drop(writer);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}
