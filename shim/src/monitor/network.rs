//! The machine's network devices: which slot has which device of the container's namespace.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;

use rvm_protocol::{AgentError, Interface, NetworkConfig, Request};
use rvm_vmm::virtio::net::{NetDevice, Rates};

use super::boot::{FIRST_FREE_SLOT, SLOTS};
use super::clients::ClientId;
use super::commands::Pending;
use super::service::Service;
use crate::bundle::NetworkRates;
use crate::cause::Cause;
use crate::control::Answer;
use crate::network::Wiring;

/// The slots, by the namespace's numbers of the devices.
#[derive(Debug, Default)]
pub(super) struct Plugged {
    slots: BTreeMap<u32, u8>,
    /// The change that the guest has not confirmed.
    change: Change,
}

/// Devices that come and go.
#[derive(Debug, Default)]
struct Change {
    new: Vec<u32>,
    gone: Vec<u32>,
}

impl Plugged {
    fn free_slot(&self) -> Option<u8> {
        (FIRST_FREE_SLOT..SLOTS).find(|slot| !self.slots.values().any(|taken| taken == slot))
    }
}

impl Service {
    /// Plugs the devices that are new, and fills in everybody's slot.
    pub(super) fn plug_network(
        &mut self,
        wiring: Wiring,
        taps: Vec<OwnedFd>,
    ) -> Result<NetworkConfig, String> {
        let Wiring { mut config, devices } = wiring;
        let new: Vec<u32> =
            devices.iter().filter(|device| !self.plugged.slots.contains_key(device)).copied().collect();
        if config.interfaces.len() != devices.len() || new.len() != taps.len() {
            return Err("the number of interfaces and of their taps differ".into());
        }
        let known = self.plugged.slots.keys();
        let gone = known.filter(|device| !devices.contains(device)).copied().collect();
        self.plugged.change = Change { new, gone };
        let mut taps = taps.into_iter();
        for (interface, device) in config.interfaces.iter_mut().zip(devices) {
            let slot = match self.plugged.slots.get(&device) {
                Some(slot) => Ok(*slot),
                None => self.plug_interface(device, interface, taps.next()),
            };
            interface.slot = slot.inspect_err(|_| self.undo_change())?;
        }
        Ok(config)
    }

    fn plug_interface(
        &mut self,
        device: u32,
        interface: &Interface,
        tap: Option<OwnedFd>,
    ) -> Result<u8, String> {
        let tap = tap.ok_or("a tap is missing")?;
        let slot = self.plugged.free_slot().ok_or_else(|| {
            format!("the virtual machine has no slot left for interface {}", interface.name)
        })?;
        let mtu = u16::try_from(interface.mtu).unwrap_or(u16::MAX);
        let mut card = NetDevice::new(tap, interface.mac, mtu, self.events.handle());
        card.limit(rates(self.setup.network_rates))
            .map_err(|error| format!("cannot limit interface {}: {}", interface.name, Cause::from(error)))?;
        self.machine
            .plug(slot, Box::new(card))
            .map_err(|error| format!("cannot plug interface {}: {error}", interface.name))?;
        self.plugged.slots.insert(device, slot);
        Ok(slot)
    }

    /// The namespace has changed under the running container.
    pub(super) fn on_network(
        &mut self,
        client: ClientId,
        wiring: Wiring,
        taps: Vec<OwnedFd>,
    ) -> Result<(), String> {
        if !self.start_asked || self.init.status().is_some() {
            return Err("container not running".into());
        }
        let config = self.plug_network(wiring, taps)?;
        self.request(Request::Network(config), Pending::Network(client));
        Ok(())
    }

    /// The guest has configured the network, or could not.
    pub(super) fn on_network_reply(&mut self, client: ClientId, error: Option<AgentError>) {
        match error {
            None => {
                let gone = std::mem::take(&mut self.plugged.change).gone;
                self.unplug(&gone);
                self.clients.answer(client, &Answer::Done, &[]);
            }
            Some(error) => {
                self.undo_change();
                self.clients.refuse(client, error);
            }
        }
    }

    /// Takes the devices out again that came with a change which did not come about.
    pub(super) fn undo_change(&mut self) {
        let new = std::mem::take(&mut self.plugged.change).new;
        self.unplug(&new);
    }

    fn unplug(&mut self, devices: &[u32]) {
        for device in devices {
            let Some(slot) = self.plugged.slots.remove(device) else { continue };
            if let Err(error) = self.machine.unplug(slot) {
                self.log.debug(format!("{}: the device in slot {slot} stays: {error}", self.setup.id));
            }
        }
    }
}

/// As the device counts: bytes of frames instead of bits.
fn rates(rates: NetworkRates) -> Rates {
    let bytes = |bits: Option<NonZeroU64>| bits.and_then(|bits| NonZeroU64::new(bits.get() / 8));
    Rates { receive: bytes(rates.receive), transmit: bytes(rates.send) }
}
