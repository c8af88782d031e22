//! A further process of the container as the monitor sees it, and when its client can be told of it.

use rvm_protocol::{ExitStatus, StandardStreams};

use super::clients::ClientId;
use super::streams::Stream;

/// A further process of the container.
#[derive(Debug)]
pub struct Execution {
    /// Whose it is.
    pub client: ClientId,
    /// How many streams it has.
    pub expected_streams: usize,
    /// Its streams, as far as they are connected.
    pub streams: Vec<Stream>,
    /// Whether the agent has started it.
    pub started: bool,
    /// Whether the client was told.
    pub announced: bool,
    /// How it ended.
    pub status: Option<ExitStatus>,
}

/// What can be done for the client of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing new.
    Wait,
    /// It can be told that the process runs, and gets the streams.
    Announce,
    /// The process has ended and not all of its streams have come: those that are missing never will.
    GiveUp,
}

impl Execution {
    /// A process that is asked for.
    pub fn new(client: ClientId, streams: &StandardStreams) -> Execution {
        Execution {
            client,
            expected_streams: count(streams),
            streams: Vec::new(),
            started: false,
            announced: false,
            status: None,
        }
    }

    /// What can be done now.
    pub fn progress(&self) -> Progress {
        if self.announced || !self.started {
            Progress::Wait
        } else if self.streams.len() == self.expected_streams {
            Progress::Announce
        } else if self.status.is_some() {
            Progress::GiveUp
        } else {
            Progress::Wait
        }
    }
}

fn count(streams: &StandardStreams) -> usize {
    match streams {
        StandardStreams::Terminal { .. } => 1,
        StandardStreams::Pipes { stdin, stdout, stderr } => {
            [stdin, stdout, stderr].into_iter().filter(|token| token.is_some()).count()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rvm_protocol::{ProcessId, StreamToken};

    use super::super::streams::StreamRole;
    use super::*;

    fn execution(stdin: Option<StreamToken>) -> Execution {
        let token = Some(StreamToken([1; 16]));
        Execution::new(ClientId::for_test(1), &StandardStreams::Pipes { stdin, stdout: token, stderr: token })
    }

    fn stream(role: StreamRole) -> Stream {
        Stream { process: ProcessId(1), role, connection: UnixStream::pair().unwrap().0 }
    }

    #[test]
    fn a_process_is_announced_once_it_runs_and_its_streams_are_there() {
        let mut execution = execution(None);
        execution.streams.push(stream(StreamRole::Stdout));
        execution.started = true;
        assert_eq!(execution.progress(), Progress::Wait);
        execution.streams.push(stream(StreamRole::Stderr));
        assert_eq!(execution.progress(), Progress::Announce, "no stream is awaited that is /dev/null");
        execution.announced = true;
        assert_eq!(execution.progress(), Progress::Wait);
    }

    #[test]
    fn a_process_that_has_ended_without_its_streams_is_given_up() {
        let mut execution = execution(Some(StreamToken([2; 16])));
        execution.streams.push(stream(StreamRole::Stdout));
        execution.status = Some(ExitStatus::Code(0));
        assert_eq!(execution.progress(), Progress::Wait, "whether it was started is told next");
        execution.started = true;
        assert_eq!(execution.progress(), Progress::GiveUp);
    }
}
