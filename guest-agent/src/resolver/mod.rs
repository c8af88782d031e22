//! Docker's name server in the guest: the agent listens for what is sent to 127.0.0.11, and the monitor, on the other
//! side of a vsock connection, asks dockerd.
//!
//! The agent looks into no message: it keeps who has asked under a number, and gives them the answer that comes with
//! it. Everything is bounded, and the oldest gives way: a program that floods keeps itself and its neighbours in this
//! container from their answers, and nobody else.

mod client;
mod redirect;
#[cfg(test)]
mod tests;
mod upstream;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::path::Path;

use nix::sys::epoll::EpollFlags;
use rvm_protocol::{HOST_PORTS, Lookup, MAX_DNS_MESSAGE, Transport};

use self::client::Client;
use self::redirect::Redirection;
use self::upstream::Upstream;
use crate::error::{Context, Result};
use crate::event::{Poller, Target};
use crate::host::Host;

/// Where the container's processes send their queries, by their `resolv.conf`.
const DOCKER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 11), 53);

/// How many queries may be without an answer.
const MAX_ASKED: usize = 1024;
/// How many connections there may be.
const MAX_CLIENTS: usize = 32;
/// How many datagrams are read before others of the agent's loop get their turn.
const BATCH: usize = 16;
/// How many ports are tried.
const ATTEMPTS: usize = 16;

/// What an error interrupts.
const REDIRECTING: fn() -> &'static str = || "redirecting what is sent to Docker's name server";

/// The listener, and who waits for what.
pub struct Resolver {
    datagrams: UdpSocket,
    listener: TcpListener,
    upstream: Upstream,
    clients: BTreeMap<u32, Client>,
    next_client: u32,
    /// By the numbers of their queries, which grow.
    asked: BTreeMap<u32, Asker>,
    next_query: u32,
    /// What leads here, until it is in force for all.
    redirection: Option<Redirection>,
}

/// Who gets an answer.
enum Asker {
    Datagram(SocketAddr),
    Client(u32),
}

impl Resolver {
    /// Listens, with nothing that leads here.
    pub fn new(poller: &Poller) -> Result<Resolver> {
        let mut resolver = Resolver::listen(poller, *DOCKER.ip())
            .context(|| "listening in the place of Docker's name server")?;
        let port = resolver.datagrams.local_addr().context(|| "asking for a port")?.port();
        let namespace =
            redirect::namespace_of(&resolver.datagrams).context(|| "asking for a namespace's name")?;
        let redirection = Redirection::new(namespace, port).context(REDIRECTING)?;
        resolver.redirection = Some(redirection);
        Ok(resolver)
    }

    /// Leads the processes of a cgroup here.
    pub fn lead(&self, cgroup: &Path) -> Result<()> {
        self.redirection.iter().try_for_each(|redirection| redirection.enforce(cgroup)).context(REDIRECTING)
    }

    /// Leads all processes of the guest here for good, by its first cgroup. Nothing is left to be done after that.
    pub fn lead_all(&mut self, first: &Path) -> Result<()> {
        self.lead(first)?;
        self.redirection = None;
        Ok(())
    }

    fn listen(poller: &Poller, address: Ipv4Addr) -> io::Result<Resolver> {
        let (datagrams, listener) = bind(address)?;
        datagrams.set_nonblocking(true)?;
        listener.set_nonblocking(true)?;
        poller.add(&datagrams, Target::ResolverDatagrams, EpollFlags::EPOLLIN)?;
        poller.add(&listener, Target::ResolverListener, EpollFlags::EPOLLIN)?;
        Ok(Resolver {
            datagrams,
            listener,
            upstream: Upstream::default(),
            clients: BTreeMap::new(),
            next_client: 0,
            asked: BTreeMap::new(),
            next_query: 0,
            redirection: None,
        })
    }

    /// Acts on an event of one of its own targets.
    pub fn on_event(&mut self, target: Target, ready: EpollFlags, host: &dyn Host, poller: &Poller) {
        match target {
            Target::Resolver => self.on_upstream(ready, poller),
            Target::ResolverDatagrams => self.on_datagrams(host, poller),
            Target::ResolverListener => self.on_connection(poller),
            Target::ResolverClient(id) => self.on_client(id, ready, host, poller),
            _ => {}
        }
    }

    /// Takes queries that have come as datagrams.
    fn on_datagrams(&mut self, host: &dyn Host, poller: &Poller) {
        let mut message = vec![0; MAX_DNS_MESSAGE];
        for _ in 0..BATCH {
            // An error is that of an answer which nobody wanted any more.
            let Ok((length, from)) = self.datagrams.recv_from(&mut message) else { break };
            self.ask(host, Transport::Udp, message[..length].to_vec(), Asker::Datagram(from));
        }
        self.settle_upstream(poller);
    }

    /// Takes a new connection.
    fn on_connection(&mut self, poller: &Poller) {
        let Ok((stream, _)) = self.listener.accept() else { return };
        let id = self.next_client;
        self.next_client = self.next_client.wrapping_add(1);
        let Ok(client) = Client::new(id, stream) else { return };
        self.clients.insert(id, client);
        self.settle_client(id, poller);
        if self.clients.len() > MAX_CLIENTS
            && let Some(oldest) = self.clients.keys().next().copied()
        {
            self.close_client(oldest, poller);
        }
    }

    /// Something happened at a connection.
    fn on_client(&mut self, id: u32, ready: EpollFlags, host: &dyn Host, poller: &Poller) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if ready.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            match client.read() {
                Ok(queries) => {
                    for query in queries {
                        self.ask(host, Transport::Tcp, query, Asker::Client(id));
                    }
                }
                Err(_) => return self.close_client(id, poller),
            }
        }
        self.settle_client(id, poller);
        self.settle_upstream(poller);
    }

    /// Something happened at the connection to the host.
    fn on_upstream(&mut self, ready: EpollFlags, poller: &Poller) {
        match self.upstream.receive(ready) {
            Ok(answers) => answers.into_iter().for_each(|answer| self.answer(answer, poller)),
            Err(_) => return self.give_up(poller),
        }
        self.settle_upstream(poller);
    }

    fn ask(&mut self, host: &dyn Host, transport: Transport, message: Vec<u8>, asker: Asker) {
        let number = self.next_query;
        self.next_query = self.next_query.wrapping_add(1);
        if self.upstream.send(host, &Lookup { number, transport, message }).is_err() {
            // As over any network: who is in earnest asks again.
            return;
        }
        self.asked.insert(number, asker);
        if self.asked.len() > MAX_ASKED {
            self.asked.pop_first();
        }
    }

    fn answer(&mut self, answer: Lookup, poller: &Poller) {
        match self.asked.remove(&answer.number) {
            Some(Asker::Datagram(to)) => drop(self.datagrams.send_to(&answer.message, to)),
            Some(Asker::Client(id)) => {
                if let Some(client) = self.clients.get_mut(&id) {
                    client.answer(&answer.message);
                    self.settle_client(id, poller);
                }
            }
            None => {}
        }
    }

    fn settle_client(&mut self, id: u32, poller: &Poller) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if client.write().is_err() || client.is_done() || client.arm(poller).is_err() {
            self.close_client(id, poller);
        }
    }

    fn close_client(&mut self, id: u32, poller: &Poller) {
        if let Some(client) = self.clients.remove(&id) {
            client.release(poller);
        }
    }

    fn settle_upstream(&mut self, poller: &Poller) {
        if self.upstream.flush(poller).is_err() {
            self.give_up(poller);
        }
    }

    /// The connection to the host is of no use any more; the next query makes another.
    fn give_up(&mut self, poller: &Poller) {
        self.upstream.disconnect(poller);
        self.asked.clear();
        for id in self.clients.keys().copied().collect::<Vec<_>>() {
            self.close_client(id, poller);
        }
    }
}

/// A port for datagrams and streams alike, so that one rule leads to both. All guests that go on from one state have the same, so
/// it is one that programs do not use: what comes to these from elsewhere stays on the host.
fn bind(address: Ipv4Addr) -> io::Result<(UdpSocket, TcpListener)> {
    let mut refused = None;
    for port in HOST_PORTS.rev().take(ATTEMPTS) {
        let bound = UdpSocket::bind((address, port))
            .and_then(|datagrams| Ok((datagrams, TcpListener::bind((address, port))?)));
        match bound {
            Ok(bound) => return Ok(bound),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
}
