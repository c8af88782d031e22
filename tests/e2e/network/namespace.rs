//! Network namespaces of the host's, for containers that join them.

use anyhow::Result;
use serde_json::{Value, json};

use crate::command::shell;

/// A network namespace with a name. It goes when it is dropped.
pub struct Namespace {
    name: String,
}

impl Namespace {
    pub fn new(name: &str) -> Result<Namespace> {
        shell(&format!("ip netns add {name}"))?.expect_code(0)?;
        Ok(Namespace { name: name.to_owned() })
    }

    /// One with an interface, eth0, that has this address; the other end is there as well, as far.
    pub fn with_interface(name: &str, address: &str) -> Result<Namespace> {
        let namespace = Namespace::new(name)?;
        let address = format!("address add {address} dev eth0");
        namespace.plumb(&["link add eth0 type veth peer name far", &address, "link set eth0 up"])?;
        Ok(namespace)
    }

    /// Runs `ip` with each of these lines in it.
    pub fn plumb(&self, lines: &[&str]) -> Result<()> {
        let name = &self.name;
        lines.iter().try_for_each(|line| shell(&format!("ip -n {name} {line}"))?.expect_code(0).map(drop))
    }

    /// Has a bundle's container join it.
    pub fn join(&self, config: &mut Value) {
        let namespaces = config["linux"]["namespaces"].as_array_mut();
        for namespace in namespaces.into_iter().flatten().filter(|one| one["type"] == "network") {
            namespace["path"] = json!(format!("/run/netns/{}", self.name));
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = shell(&format!("ip netns delete {}", self.name));
    }
}
