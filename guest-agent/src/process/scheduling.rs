//! How a process is scheduled: its personality, and later its policy and I/O priority.

use nix::sys::personality::{self, Persona};
use oci_spec::runtime::{LinuxPersonality, LinuxPersonalityDomain};

use crate::error::{Context, Result};

/// Sets the execution domain of the calling process.
pub fn set_personality(wanted: &LinuxPersonality) -> Result<()> {
    let persona = match wanted.domain() {
        LinuxPersonalityDomain::PerLinux => Persona::empty(),
        // PER_LINUX32; nix names only the flags beside the domain.
        LinuxPersonalityDomain::PerLinux32 => Persona::from_bits_retain(0x0008),
    };
    personality::set(persona).map(drop).context(|| "setting the personality")
}
