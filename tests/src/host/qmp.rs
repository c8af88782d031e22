//! QEMU's control socket, as much of its protocol (QMP) as the test host needs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection that has been greeted and may send commands.
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the machine behind the socket; fails when it has ended.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("the test host does not run")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut qmp = Self { stream: BufReader::new(stream) };
        qmp.receive()?;
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    /// Whether a machine listens on the socket.
    pub fn is_alive(socket: &Path) -> bool {
        UnixStream::connect(socket).is_ok()
    }

    /// Sends a command without arguments and returns its result.
    pub fn execute(&mut self, command: &str) -> Result<Value> {
        writeln!(self.stream.get_mut(), "{}", json!({ "execute": command }))?;
        loop {
            let mut reply = self.receive()?;
            if let Some(error) = reply.get("error") {
                bail!("QEMU refused {command}: {error}");
            }
            // Events arrive at any time, between a command and its result too.
            if let Some(result) = reply.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    /// Waits until the machine has ended and QEMU has closed the socket.
    pub fn wait_for_end(mut self) {
        while self.receive().is_ok() {}
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("QEMU does not answer")? == 0 {
            bail!("QEMU has ended");
        }
        serde_json::from_str(&line).context("QEMU's answer is not JSON")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_result_is_found_among_events() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let mut peer = BufReader::new(listener.accept().unwrap().0);
            writeln!(peer.get_mut(), "{{\"QMP\": {{}}}}").unwrap();
            for reply in
                ["{\"return\": {}}", "{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"running\"}}"]
            {
                peer.read_line(&mut String::new()).unwrap();
                writeln!(peer.get_mut(), "{reply}").unwrap();
            }
        });
        let mut qmp = Qmp::connect(&socket).unwrap();
        assert_eq!(qmp.execute("query-status").unwrap()["status"], "running");
        server.join().unwrap();
        assert!(qmp.execute("quit").is_err());
    }
}
