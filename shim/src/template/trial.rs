//! A template is tried before others use it: a machine goes on from it, and starts a container.
//!
//! One from which no container starts would cost every container its start. And what the guest has touched of its memory by the
//! end of a small program, it will touch each time. The container has a network, as most have, which leads nowhere.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rvm_protocol::{
    Address, ExitStatus, FromAgent, Interface, NetworkConfig, Request, StandardStreams, StartContainer,
};
use rvm_vmm::machine::Touched;
use rvm_vmm::virtio::net::NetDevice;

use super::builder::{await_message, come_up};
use super::{Template, TemplateError};
use crate::bundle::{Bundle, BundleError};
use crate::container::shape::Shape;
use crate::monitor::MonitorError;
use crate::monitor::boot::{self, Booting, Built, FIRST_FREE_SLOT};
use crate::network;
use crate::programs;
use crate::spec::default_spec;
use crate::timeline::Timeline;

/// Name of the container's program.
const PROGRAM: &str = "program";
/// The usual MTU of Ethernet, in bytes.
const MTU: u16 = 1500;

/// Runs a container in a machine that goes on from a template, and tells what that took of its memory.
pub(super) fn run(template: Template, shape: Shape, root: &Path) -> Result<Touched, TemplateError> {
    make_program(&root.join(PROGRAM))
        .map_err(TemplateError::system(format!("cannot write to {}", root.display())))?;
    let mut start =
        container("template", root, &[&format!("/{PROGRAM}")]).map_err(TemplateError::container)?;
    let machine = boot::restore(shape, &template, &mut Timeline::default())?;
    let (booting, mut agent) = come_up(Built::restored(machine, template)?, root)?;
    start.network = plug_network(&booting)?;
    let number = agent.request(Request::Start(Box::new(start))).map_err(TemplateError::guest)?;
    let ended = await_message(&booting, &mut agent, |message| match message {
        FromAgent::Reply { request, result: Err(error) } if request == number => Some(Err(error)),
        FromAgent::Exited { status, .. } => Some(Ok(status)),
        _ => None,
    });
    match ended.map_err(TemplateError::with_container)?.map_err(TemplateError::container)? {
        ExitStatus::Code(0) => {}
        other => return Err(TemplateError::container(format!("its program ended with {other:?}"))),
    }
    // Nobody has to have it, and a host may not tell.
    Ok(booting.machine.touched().unwrap_or_default())
}

/// Plugs a network that leads nowhere, and tells what the guest shall make of it.
fn plug_network(booting: &Booting) -> Result<NetworkConfig, TemplateError> {
    // A host that makes no taps has no containers with a network.
    let Ok(tap) = network::tap_apart() else { return Ok(NetworkConfig::default()) };
    let interface = interface();
    let device = NetDevice::new(tap, interface.mac, MTU, booting.events.handle());
    booting.machine.plug(interface.slot, Box::new(device)).map_err(MonitorError::from)?;
    Ok(NetworkConfig { interfaces: vec![interface], ..NetworkConfig::default() })
}

/// What Docker would give its first container, but for the way out.
fn interface() -> Interface {
    let address = Address { ip: Ipv4Addr::new(172, 17, 0, 2).into(), prefix: 16, broadcast: None };
    Interface {
        slot: FIRST_FREE_SLOT,
        name: "eth0".into(),
        mac: [0x02, 0x42, 0xac, 0x11, 0, 2],
        mtu: MTU.into(),
        addresses: vec![address],
    }
}

/// A container that ends soon, like those that `rvm spec` describes, with this for a program.
pub(super) fn container(id: &str, root: &Path, command: &[&str]) -> Result<StartContainer, BundleError> {
    let mut spec = default_spec(false);
    if let Some(process) = spec.process_mut() {
        process.set_terminal(Some(false)).set_args(Some(command.iter().map(ToString::to_string).collect()));
    }
    if let Some(place) = spec.root_mut() {
        place.set_path(root.to_owned());
    }
    let bundle = Bundle::from_spec(root, spec)?;
    Ok(StartContainer {
        id: id.into(),
        spec: bundle.guest_spec_json(),
        streams: StandardStreams::Pipes { stdin: None, stdout: None, stderr: None },
        network: NetworkConfig::default(),
        seccomp: None,
        hook_state: "{}".into(),
        memory_limit: None,
        host_mounts: Vec::new(),
        disks: Vec::new(),
    })
}

fn make_program(path: &Path) -> io::Result<()> {
    for folder in ["proc", "dev", "sys"] {
        fs::create_dir(path.with_file_name(folder))?;
    }
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o755).open(path)?;
    file.write_all(&programs::typical())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_program_ends_well() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(PROGRAM);
        make_program(&path).unwrap();
        assert!(Command::new(&path).status().unwrap().success());
        let start = container("template", folder.path(), &["/program"]).unwrap();
        assert!(start.spec.contains("\"/program\""), "{}", start.spec);
    }
}
