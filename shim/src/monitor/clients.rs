//! Connections of `rvm` commands to the control socket.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{SockFlag, accept4, getsockopt, sockopt};
use rvm_protocol::ProcessId;

use crate::control::{Answer, Command, Packet, Refusal, receive, send};

/// The most connections at a time: one stays open for each `exec`.
const MAX_CLIENTS: usize = 4096;

/// Names a connection; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(u64);

#[cfg(test)]
impl ClientId {
    /// An ID where no connection is needed.
    pub fn for_test(number: u64) -> ClientId {
        ClientId(number)
    }
}

/// One connection.
#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    /// The process that it has started and that ends with it.
    process: Option<ProcessId>,
}

/// All connections, and the socket where they arrive.
#[derive(Debug)]
pub struct Clients {
    listener: OwnedFd,
    connections: BTreeMap<ClientId, Client>,
    next: u64,
}

impl Clients {
    /// Listens on the control socket.
    pub fn new(listener: OwnedFd) -> Clients {
        Clients { listener, connections: BTreeMap::new(), next: 0 }
    }

    /// Where connections arrive.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The connections to poll for input.
    pub fn connections(&self) -> impl Iterator<Item = (ClientId, BorrowedFd<'_>)> {
        self.connections.iter().map(|(id, client)| (*id, client.socket.as_fd()))
    }

    /// Takes a connection that waits, if its process belongs to who runs this monitor.
    pub fn accept(&mut self) -> io::Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = accept4(self.listener.as_raw_fd(), flags)?;
        // SAFETY: accept4 has returned a new descriptor that nothing else owns.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let peer = getsockopt(&socket, sockopt::PeerCredentials)?.uid();
        let allowed = peer == 0 || peer == nix::unistd::geteuid().as_raw();
        if allowed && self.connections.len() < MAX_CLIENTS {
            self.connections.insert(ClientId(self.next), Client { socket, process: None });
            self.next += 1;
        }
        Ok(())
    }

    /// The command that has arrived on a connection; none when it has ended or broken, and it is then dropped.
    pub fn receive(&mut self, id: ClientId) -> Option<Packet<Command>> {
        let client = self.connections.get(&id)?;
        match receive::<Command>(&client.socket) {
            Ok(Some(packet)) => Some(packet),
            _ => None,
        }
    }

    /// Answers. A client that does not read its answers is gone, or will be seen to be.
    pub fn answer(&self, id: ClientId, answer: &Answer, descriptors: &[BorrowedFd<'_>]) {
        if let Some(client) = self.connections.get(&id) {
            let _ = send(&client.socket, answer, descriptors);
        }
    }

    /// Refuses what a client asked, and says why.
    pub fn refuse(&self, id: ClientId, why: impl Into<Refusal>) {
        self.answer(id, &Answer::Refused(why.into()), &[]);
    }

    /// Ties a process to a connection.
    pub fn set_process(&mut self, id: ClientId, process: ProcessId) {
        if let Some(client) = self.connections.get_mut(&id) {
            client.process = Some(process);
        }
    }

    /// The process that a connection has started.
    pub fn process(&self, id: ClientId) -> Option<ProcessId> {
        self.connections.get(&id)?.process
    }

    /// Drops a connection; returns the process that ends with it.
    pub fn remove(&mut self, id: ClientId) -> Option<ProcessId> {
        self.connections.remove(&id)?.process
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::Folder;
    use crate::control::Connection;

    fn listening() -> (tempfile::TempDir, Folder, Clients) {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), "c").unwrap();
        let clients = Clients::new(folder.listen().unwrap());
        (root, folder, clients)
    }

    #[test]
    fn a_command_is_answered_on_its_connection() {
        let (_root, folder, mut clients) = listening();
        let connection = Connection::open(&folder.socket_path()).unwrap();
        clients.accept().unwrap();
        let (id, _) = clients.connections().next().unwrap();
        connection.send(&Command::Pause, &[]).unwrap();
        assert_eq!(clients.receive(id).unwrap().message, Command::Pause);
        clients.refuse(id, "not now");
        assert_eq!(connection.receive().unwrap_err().to_string(), "not now");
    }

    #[test]
    fn the_end_of_a_connection_names_its_process() {
        let (_root, folder, mut clients) = listening();
        let connection = Connection::open(&folder.socket_path()).unwrap();
        clients.accept().unwrap();
        let (id, _) = clients.connections().next().unwrap();
        clients.set_process(id, ProcessId(3));
        drop(connection);
        assert!(clients.receive(id).is_none());
        assert_eq!(clients.remove(id), Some(ProcessId(3)));
        assert_eq!(clients.remove(id), None);
    }
}
