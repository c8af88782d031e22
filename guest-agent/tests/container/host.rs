//! A host for the agent under test: sockets in the place of the vsock, and a container of busybox.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rvm_protocol::{
    AgentError, CONTROL_PORT, ExecProcess, ExitStatus, FromAgent, NetworkConfig, ProcessId, REHEARSAL_ID,
    Reply, Request, STREAM_HEADER_LEN, STREAM_PORT, SeccompProgram, StandardStreams, StartContainer,
    StreamHeader, StreamToken, ToAgent, VERSION, read_frame, write_frame,
};
use serde_json::{Value, json};

/// The host's half: the control connection, and the streams as the agent connects them.
pub struct Host {
    directory: tempfile::TempDir,
    agent: Child,
    control: UnixStream,
    arrivals: Receiver<(StreamToken, UnixStream)>,
    arrived: HashMap<[u8; 16], UnixStream>,
    next_request: u64,
    next_token: u8,
    events: Vec<FromAgent>,
}

/// A process's streams at the host, by tokens.
pub struct Streams {
    stdin: StreamToken,
    stdout: StreamToken,
    stderr: StreamToken,
}

/// What became of a process.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// The standard output of a process that has succeeded.
    pub fn success(self) -> String {
        assert_eq!(self.status, ExitStatus::Code(0), "{self:?}");
        self.stdout
    }
}

impl Host {
    /// Starts an agent and waits until it is up.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["rootfs", "pristine", "root"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        fill_rootfs(&directory.path().join("rootfs"));
        let listen = |port: u32| UnixListener::bind(directory.path().join(port.to_string())).unwrap();
        let (control, streams) = (listen(CONTROL_PORT), listen(STREAM_PORT));
        let arrivals = accept_streams(streams);
        let mut agent = Command::new(std::env::current_exe().unwrap())
            .arg(crate::AGENT)
            .arg(directory.path())
            .spawn()
            .unwrap();
        let mut control = accept_from(&control, &mut agent);
        match read_frame(&mut control).unwrap() {
            FromAgent::Ready { version, kernel } => assert!(version == VERSION && !kernel.is_empty()),
            other => panic!("the first message is {other:?}"),
        }
        Self {
            directory,
            agent,
            control,
            arrivals,
            arrived: HashMap::new(),
            next_request: 1,
            next_token: 1,
            events: Vec::new(),
        }
    }

    /// Where the container's root file system lies.
    pub fn rootfs(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    /// Starts the container and lets it run to its end, without input.
    pub fn run(&mut self, spec: &Value) -> Outcome {
        let streams = self.start(spec).unwrap();
        self.finish(ProcessId::INIT, streams)
    }

    /// Starts the container with pipes.
    pub fn start(&mut self, spec: &Value) -> Result<Streams, AgentError> {
        self.start_with(spec, None)
    }

    /// Starts the container with pipes and a filter.
    pub fn start_with(
        &mut self,
        spec: &Value,
        seccomp: Option<SeccompProgram>,
    ) -> Result<Streams, AgentError> {
        let (streams, wire) = self.pipes();
        self.start_as(spec, wire, seccomp)?;
        Ok(streams)
    }

    /// Starts the container with a terminal, whose stream it returns.
    pub fn start_on_terminal(&mut self, spec: &Value, rows: u16, columns: u16) -> UnixStream {
        let token = self.token();
        self.start_as(spec, StandardStreams::Terminal { token, rows, columns }, None).unwrap();
        self.stream(token)
    }

    /// Has a container of no consequence started, before there is another.
    pub fn rehearse(&mut self, spec: &Value) -> Result<Reply, AgentError> {
        let streams = StandardStreams::Pipes { stdin: None, stdout: None, stderr: None };
        self.request(Request::Rehearse(start_request(REHEARSAL_ID, spec, streams, None)))
    }

    /// What the agent has, as its parent's child, from outside of its namespaces.
    pub fn traces(&self) -> Traces {
        let children = |pid: &str| {
            fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap().trim().to_owned()
        };
        let agent = children(&self.agent.id().to_string());
        Traces {
            children: children(&agent),
            descriptors: fs::read_dir(format!("/proc/{agent}/fd")).unwrap().count(),
            mounts: fs::read_to_string(format!("/proc/{agent}/mountinfo")).unwrap(),
        }
    }

    /// Starts a further process with pipes.
    pub fn exec(&mut self, id: u32, process: &Value) -> Result<Streams, AgentError> {
        let (streams, wire) = self.pipes();
        self.exec_as(id, process, wire)?;
        Ok(streams)
    }

    /// Starts a further process with a terminal, whose stream it returns.
    pub fn exec_on_terminal(&mut self, id: u32, process: &Value) -> UnixStream {
        let token = self.token();
        self.exec_as(id, process, StandardStreams::Terminal { token, rows: 24, columns: 80 }).unwrap();
        self.stream(token)
    }

    /// Runs a further process to its end, without input.
    pub fn run_exec(&mut self, id: u32, process: &Value) -> Outcome {
        let streams = self.exec(id, process).unwrap();
        self.finish(ProcessId(id), streams)
    }

    /// Closes a process's input and waits for its end.
    pub fn finish(&mut self, id: ProcessId, streams: Streams) -> Outcome {
        self.stream(streams.stdin).shutdown(Shutdown::Write).unwrap();
        let (stdout, stderr) = (read_all(self.stdout(&streams)), read_all(self.stderr(&streams)));
        let status = self.exited(id);
        Outcome { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
    }

    /// The host's end of a standard input.
    pub fn stdin(&mut self, streams: &Streams) -> UnixStream {
        self.stream(streams.stdin)
    }

    /// The host's end of a standard output.
    pub fn stdout(&mut self, streams: &Streams) -> UnixStream {
        self.stream(streams.stdout)
    }

    /// The host's end of a standard error.
    pub fn stderr(&mut self, streams: &Streams) -> UnixStream {
        self.stream(streams.stderr)
    }

    /// Sends a request and waits for its answer; events meanwhile are kept.
    pub fn request(&mut self, body: Request) -> Result<Reply, AgentError> {
        let number = self.send(body);
        self.answer(number)
    }

    fn send(&mut self, body: Request) -> u64 {
        let number = self.next_request;
        self.next_request += 1;
        write_frame(&mut self.control, &ToAgent { request: number, body }).unwrap();
        number
    }

    fn answer(&mut self, number: u64) -> Result<Reply, AgentError> {
        let wanted = |event: &FromAgent| match event {
            FromAgent::Reply { request, result } if *request == number => Some(result.clone()),
            _ => None,
        };
        self.event(wanted)
    }

    /// Sends the request to start the container, whose answer is yet to come.
    pub fn begin(&mut self, spec: &Value) -> u64 {
        let (_, streams) = self.pipes();
        self.send(Request::Start(start_request("test", spec, streams, None)))
    }

    /// Signals a process that a request has begun, and returns how that request failed.
    pub fn kill_while_starting(&mut self, begun: u64) -> AgentError {
        self.signal(0, libc::SIGKILL, false).unwrap();
        self.answer(begun).unwrap_err()
    }

    /// Waits for the end of a process.
    pub fn exited(&mut self, id: ProcessId) -> ExitStatus {
        self.event(|event| match event {
            FromAgent::Exited { process, status } if *process == id => Some(*status),
            _ => None,
        })
    }

    /// Waits for an event, and forgets it.
    pub fn event<T>(&mut self, wanted: impl Fn(&FromAgent) -> Option<T>) -> T {
        loop {
            if let Some(found) = self.events.iter().position(|event| wanted(event).is_some()) {
                return wanted(&self.events.remove(found)).unwrap();
            }
            let next = read_frame(&mut self.control).unwrap();
            self.events.push(next);
        }
    }

    /// The ends of processes in the order in which they were told.
    pub fn order_of_ends(&mut self, count: usize) -> Vec<ProcessId> {
        while self.events.len() < count {
            let next = read_frame(&mut self.control).unwrap();
            self.events.push(next);
        }
        let end = |event: &FromAgent| match event {
            FromAgent::Exited { process, .. } => Some(*process),
            _ => None,
        };
        self.events.iter().filter_map(end).collect()
    }

    /// Sends a signal.
    pub fn signal(&mut self, id: u32, signal: i32, all: bool) -> Result<Reply, AgentError> {
        self.request(Request::Signal { process: ProcessId(id), signal, all })
    }

    fn start_as(
        &mut self,
        spec: &Value,
        streams: StandardStreams,
        seccomp: Option<SeccompProgram>,
    ) -> Result<(), AgentError> {
        let started = self.request(Request::Start(start_request("test", spec, streams, seccomp)))?;
        assert!(matches!(started, Reply::Started { guest_pid } if guest_pid > 1), "{started:?}");
        Ok(())
    }

    fn exec_as(&mut self, id: u32, process: &Value, streams: StandardStreams) -> Result<(), AgentError> {
        let process =
            ExecProcess { process: ProcessId(id), spec: process.to_string(), streams, seccomp: None };
        self.request(Request::Exec(Box::new(process))).map(drop)
    }

    fn pipes(&mut self) -> (Streams, StandardStreams) {
        let streams = Streams { stdin: self.token(), stdout: self.token(), stderr: self.token() };
        let wire = StandardStreams::Pipes {
            stdin: Some(streams.stdin),
            stdout: Some(streams.stdout),
            stderr: Some(streams.stderr),
        };
        (streams, wire)
    }

    fn token(&mut self) -> StreamToken {
        self.next_token += 1;
        StreamToken([self.next_token; 16])
    }

    fn stream(&mut self, token: StreamToken) -> UnixStream {
        while !self.arrived.contains_key(&token.0) {
            let (arrived, stream) = self.arrivals.recv().unwrap();
            self.arrived.insert(arrived.0, stream);
        }
        self.arrived[&token.0].try_clone().unwrap()
    }
}

/// What a process has.
#[derive(Debug, PartialEq, Eq)]
pub struct Traces {
    /// Process IDs.
    pub children: String,
    /// How many it has open.
    pub descriptors: usize,
    /// Its mount table.
    pub mounts: String,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.control.shutdown(Shutdown::Both);
        let status = self.agent.wait();
        if !thread::panicking() {
            assert!(status.unwrap().success(), "the agent did not end well");
            let end = fs::read_to_string(self.directory.path().join("end")).unwrap();
            assert_eq!(end, "the host closed the control connection");
        }
    }
}

fn start_request(
    id: &str,
    spec: &Value,
    streams: StandardStreams,
    seccomp: Option<SeccompProgram>,
) -> Box<StartContainer> {
    Box::new(StartContainer {
        id: id.into(),
        spec: spec.to_string(),
        streams,
        network: NetworkConfig::default(),
        seccomp,
        hook_state: json!({ "ociVersion": "1.2.0", "id": "test", "bundle": "/bundle" }).to_string(),
        memory_limit: None,
        host_mounts: Vec::new(),
        disks: Vec::new(),
    })
}

/// Waits for the agent to connect, or to end before it does.
fn accept_from(listener: &UnixListener, agent: &mut Child) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    loop {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false).unwrap();
            return stream;
        }
        if let Some(status) = agent.try_wait().unwrap() {
            panic!("the agent ended before it was up: {status}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn accept_streams(listener: UnixListener) -> Receiver<(StreamToken, UnixStream)> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut header = [0; STREAM_HEADER_LEN];
            if stream.read_exact(&mut header).is_ok() {
                let token = StreamHeader::from_bytes(header).token;
                if sender.send((token, stream)).is_err() {
                    return;
                }
            }
        }
    });
    receiver
}

/// Reads a stream to its end, aside.
pub fn read_all(mut stream: UnixStream) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // A terminal's stream may end as a broken one.
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Reads from a stream until it has brought `wanted`; returns all of it.
pub fn read_until(stream: &mut UnixStream, wanted: &str) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while !text.contains(wanted) {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "the stream ended after {text:?}");
        text.push(char::from(byte[0]));
    }
    text
}

/// Writes a line, as from a keyboard.
pub fn type_line(stream: &mut UnixStream, line: &str) {
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn fill_rootfs(rootfs: &Path) {
    for directory in ["bin", "etc", "dev", "proc", "sys", "tmp", "data", "run"] {
        fs::create_dir(rootfs.join(directory)).unwrap();
    }
    fs::copy(busybox().unwrap(), rootfs.join("bin/busybox")).unwrap();
    for tool in TOOLS {
        symlink("busybox", rootfs.join("bin").join(tool)).unwrap();
    }
    fs::set_permissions(rootfs.join("tmp"), PermissionsExt::from_mode(0o1777)).unwrap();
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/srv/app:/bin/sh\n")
        .unwrap();
    fs::write(rootfs.join("data/file"), "from the host").unwrap();
}

const TOOLS: [&str; 28] = [
    "sh", "cat", "echo", "id", "hostname", "ls", "mount", "sleep", "stty", "tty", "touch", "mkdir", "stat",
    "env", "pwd", "kill", "head", "tail", "wc", "true", "grep", "dd", "md5sum", "nproc", "readlink", "test",
    "ps", "umount",
];

/// A static busybox of this machine.
pub fn busybox() -> Option<PathBuf> {
    ["/usr/bin/busybox", "/bin/busybox"].map(PathBuf::from).into_iter().find(|path| path.exists())
}

/// A description of a process that runs a shell command as root.
pub fn shell(command: &str) -> Value {
    process(&["sh", "-c", command])
}

/// A description of a process that runs as root with the capabilities that Docker gives.
pub fn process(arguments: &[&str]) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ];
    json!({
        "user": { "uid": 0, "gid": 0 },
        "args": arguments,
        "env": ["PATH=/usr/bin:/bin"],
        "cwd": "/",
        "capabilities": {
            "bounding": capabilities,
            "effective": capabilities,
            "permitted": capabilities,
        },
    })
}

/// A description of a container, much as Docker writes it, around a process.
pub fn container(process: &Value) -> Value {
    let flags = ["nosuid", "noexec", "nodev"];
    json!({
        "ociVersion": "1.2.0",
        "root": { "path": "rootfs" },
        "hostname": "container",
        "process": process,
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": flags },
            {
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            },
            {
                "destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"],
            },
            {
                "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["ro", "nosuid", "noexec", "nodev"],
            },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": flags },
            {
                "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            },
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "uts" }, { "type": "ipc" },
                { "type": "network" },
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware", "/proc/no-such-file"],
            "readonlyPaths": ["/proc/sys", "/proc/bus"],
        },
    })
}
