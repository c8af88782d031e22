//! The five capability sets of a process (capabilities(7)).
//!
//! The order matters. The bounding set is reduced while `CAP_SETPCAP` is still held; the user changes with
//! `PR_SET_KEEPCAPS` on, so that the permitted set survives it; then the three sets of the process are set
//! at once, and at last the ambient set, which must be permitted and inheritable already.

use std::collections::HashSet;
use std::str::FromStr;

use nix::errno::Errno;
use oci_spec::runtime::{Capability, LinuxCapabilities};

use crate::error::{Context, Result, other};
use crate::sys::process::{self, CapabilityMasks};

/// The capability sets of a process, as bit masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    bounding: u64,
    ambient: u64,
    masks: CapabilityMasks,
}

impl CapabilitySets {
    /// The sets that a description asks for. Without one, a process has none.
    pub fn of(capabilities: Option<&LinuxCapabilities>) -> Result<Self> {
        let Some(capabilities) = capabilities else { return Ok(Self::default()) };
        Ok(Self {
            bounding: mask(capabilities.bounding())?,
            ambient: mask(capabilities.ambient())?,
            masks: CapabilityMasks {
                effective: mask(capabilities.effective())?,
                permitted: mask(capabilities.permitted())?,
                inheritable: mask(capabilities.inheritable())?,
            },
        })
    }

    /// Takes out of the bounding set whatever is not wanted. Returns the capabilities that the kernel knows.
    pub fn reduce_bounding_set(&self) -> Result<KnownCapabilities> {
        let mut known = 0;
        for number in 0..64u8 {
            let bit = 1 << number;
            match process::bounding_set_holds(number) {
                Ok(true) if self.bounding & bit == 0 => process::drop_from_bounding_set(number)
                    .context(|| format!("dropping capability {number} from the bounding set"))?,
                Ok(_) => {}
                Err(Errno::EINVAL) => break,
                Err(errno) => return Err(errno).context(|| "reading the capability bounding set"),
            }
            known |= bit;
        }
        Ok(KnownCapabilities(known))
    }

    /// Puts the sets in force, leaving out what the kernel does not know.
    pub fn apply(&self, KnownCapabilities(known): KnownCapabilities) -> Result<()> {
        let masks = CapabilityMasks {
            effective: self.masks.effective & self.masks.permitted & known,
            permitted: self.masks.permitted & known,
            inheritable: self.masks.inheritable & known,
        };
        process::set_capabilities(masks).context(|| "setting the capabilities")?;
        process::clear_ambient_set().context(|| "clearing the ambient capabilities")?;
        let ambient = self.ambient & masks.permitted & masks.inheritable;
        for number in (0..64u8).filter(|number| ambient & (1 << number) != 0) {
            process::raise_in_ambient_set(number)
                .context(|| format!("raising the ambient capability {number}"))?;
        }
        Ok(())
    }
}

/// The capabilities of the running kernel, as a bit mask.
#[derive(Clone, Copy, Debug)]
pub struct KnownCapabilities(u64);

fn mask(capabilities: &Option<HashSet<Capability>>) -> Result<u64> {
    capabilities.iter().flatten().try_fold(0, |mask, capability| {
        let name = format!("CAP_{capability}");
        let known = caps::Capability::from_str(&name)
            .map_err(|_| other(format!("the capability {name} is not known")))?;
        Ok(mask | known.bitmask())
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxCapabilitiesBuilder;

    use super::*;

    #[test]
    fn names_become_the_kernels_bits() {
        let wanted: HashSet<_> =
            [Capability::Chown, Capability::SysAdmin, Capability::CheckpointRestore].into();
        let capabilities = LinuxCapabilitiesBuilder::default().effective(wanted).build().unwrap();
        let sets = CapabilitySets::of(Some(&capabilities)).unwrap();
        assert_eq!(sets.masks.effective, 1 | 1 << 21 | 1 << 40);
    }

    #[test]
    fn without_a_description_there_are_none() {
        assert_eq!(CapabilitySets::of(None).unwrap(), CapabilitySets::default());
    }

    #[test]
    fn every_capability_of_the_specification_has_a_bit() {
        for known in caps::all() {
            let name = known.to_string();
            let parsed = Capability::from_str(name.trim_start_matches("CAP_")).unwrap();
            assert_eq!(mask(&Some([parsed].into())).unwrap(), 1 << known.index(), "{name}");
        }
    }
}
