//! Networks: of engines, and of one's own. A microVM's network is to be no different from that of runc's containers
//! beside it.

pub mod accidents;
pub mod bridge;
pub mod changes;
pub mod cni;
pub mod compose;
pub mod hostile;
pub mod names;
pub mod namespace;
pub mod own;
pub mod podman;
pub mod publishing;
pub mod walkthrough;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::beside_runc::Docker;
use crate::command::{docker, eventually, shell};

/// How long a single answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

const RVM: Docker = Docker { runtime: "rvm" };
const RUNC: Docker = Docker { runtime: "runc" };

/// A network of Docker's. It is removed, with the containers on it, when it is dropped.
struct Network {
    name: &'static str,
}

impl Network {
    /// Makes a network with these options.
    fn create(name: &'static str, options: &[&str]) -> Result<Network> {
        docker(&[&["network", "create"], options, &[name]].concat())?.expect_code(0)?;
        Ok(Network { name })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let name = self.name;
        let _ = shell(&format!(
            "docker ps -aq --filter network={name} | xargs -r docker rm -f -v; docker network rm {name}"
        ));
    }
}

/// Programs that stories run in containers of the debian image, in a folder for `/story`.
struct Programs {
    folder: TempDir,
}

impl Programs {
    fn new() -> Result<Programs> {
        let folder = tempfile::Builder::new().prefix("e2e-programs").tempdir_in("/var/tmp")?;
        for (name, text) in [
            ("ask.py", include_str!("network/ask.py")),
            ("connect.py", include_str!("network/connect.py")),
            ("echo.py", include_str!("network/echo.py")),
            ("flood.py", include_str!("network/flood.py")),
            ("garbage.py", include_str!("network/garbage.py")),
            ("neighbours.py", include_str!("network/neighbours.py")),
        ] {
            fs::write(folder.path().join(name), text)?;
        }
        Ok(Programs { folder })
    }

    /// Starts `echo.py` on ports of a container, and waits until it listens.
    fn start_echo(&self, engine: &Docker, options: &[&str], ports: &[&str]) -> Result<String> {
        let volume = self.volume();
        let program = ["-v", &volume, "debian", "python3", "/story/echo.py"];
        let id = engine.start(&[options, &program[..], ports].concat())?;
        eventually("the server listens", || {
            Ok(docker(&["logs", &id])?.expect_code(0)?.text().contains("ready"))
        })?;
        Ok(id)
    }

    /// The value of Docker's option `-v` that brings them along.
    fn volume(&self) -> String {
        format!("{}:/story:ro", self.folder.path().display())
    }
}

/// Fails unless a port answers a container that asks it.
fn ensure_answers_in(container: &str, kind: &str, host: &str, port: &str) -> Result<()> {
    docker(&["exec", container, "python3", "/story/ask.py", kind, host, port])?.expect_text("HELLO")
}

/// The address that Docker shows for a container: of its first network, in IPv4.
fn address(id: &str) -> Result<String> {
    let form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    Ok(docker(&["inspect", "-f", form, id])?.expect_code(0)?.text())
}

/// The host's end of the default bridge.
fn gateway() -> Result<String> {
    let form = "{{(index .IPAM.Config 0).Gateway}}";
    Ok(docker(&["network", "inspect", "bridge", "-f", form])?.expect_code(0)?.text())
}

/// Fails unless a TCP port answers what it is asked.
fn ensure_tcp_answers(place: &str) -> Result<()> {
    let mut peer = TcpStream::connect_timeout(&place.parse::<SocketAddr>()?, PATIENCE)?;
    peer.set_read_timeout(Some(PATIENCE))?;
    peer.write_all(b"hello\n")?;
    let mut answer = [0; 6];
    peer.read_exact(&mut answer)?;
    ensure!(&answer == b"HELLO\n", "{place} answered {answer:?}");
    Ok(())
}

/// Fails unless a UDP port answers what it is asked. Datagrams may be lost, so it is asked more than once.
fn ensure_udp_answers(place: &str) -> Result<()> {
    let place: SocketAddr = place.parse()?;
    let socket = UdpSocket::bind(if place.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(place)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut answer = [0; 6];
    eventually(&format!("{place} answers datagrams"), || {
        // A port that nobody listens on yet may be refused.
        let asked = socket.send(b"hello\n");
        Ok(asked.is_ok() && matches!(socket.recv(&mut answer), Ok(6)) && &answer == b"HELLO\n")
    })
}
