//! The file of a template's state: a header, and behind it a [`Record`] that the header's digest is of.

use std::fs::{File, Metadata};
use std::io::{self, Read};

use rvm_vmm::machine::{MachineState, Touched};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::TemplateError;
use super::key::FileIdentity;

/// Version of the format. It goes up with every change of it, and of the captured state.
pub const VERSION: u32 = 3;
/// What the file begins with.
const MAGIC: [u8; 8] = *b"rvmtmpl\n";
/// Bytes of the digest.
const DIGEST: usize = 32;
const HEADER: usize = MAGIC.len() + size_of::<u32>() + DIGEST;
/// No state is longer: that of a vCPU takes some 8 KiB, and there are 64 of them at most.
const MAX_LENGTH: u64 = 8 << 20;

/// What is known of a template.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// The file of the machine's memory, as it was when the state was written.
    pub(super) memory: FileIdentity,
    /// The machine's state.
    machine: Vec<u8>,
    /// What a guest touches of its memory until its container runs.
    pub soon: Touched,
}

impl Record {
    /// A machine whose memory is in this file.
    pub fn new(machine: &MachineState, memory: &Metadata) -> Record {
        Record { machine: machine.to_bytes(), memory: FileIdentity::of(memory), soon: Touched::default() }
    }

    /// One without a machine.
    #[cfg(test)]
    pub fn for_test(memory: &Metadata) -> Record {
        Record { machine: vec![1; 100], memory: FileIdentity::of(memory), soon: Touched::default() }
    }

    /// The machine's state.
    pub fn machine(&self) -> Result<MachineState, TemplateError> {
        Ok(MachineState::from_bytes(&self.machine)?)
    }
}

/// The whole content of a file of this state.
pub fn seal(state: &impl Serialize) -> Vec<u8> {
    // It fails for lack of room alone, and a vector has that.
    let body = postcard::to_stdvec(state).unwrap_or_default();
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(Sha256::digest(&body));
    bytes.extend(body);
    bytes
}

/// Reads the file of a state.
pub fn read<T: DeserializeOwned>(file: &mut File) -> Result<T, TemplateError> {
    let failed = |error: io::Error| TemplateError::system("its state cannot be read")(error);
    let mut bytes = Vec::new();
    file.take(MAX_LENGTH + 1).read_to_end(&mut bytes).map_err(failed)?;
    unseal(&bytes)
}

/// The reverse of [`seal`], for any bytes.
pub fn unseal<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, TemplateError> {
    let damaged = TemplateError::Damaged;
    if bytes.len() as u64 > MAX_LENGTH {
        return Err(damaged("it is too long"));
    }
    let (header, body) = bytes.split_at_checked(HEADER).ok_or(damaged("it is too short"))?;
    let (magic, header) = header.split_at(MAGIC.len());
    let (version, digest) = header.split_at(size_of::<u32>());
    if magic != MAGIC {
        return Err(damaged("it is the state of no machine"));
    }
    if version != VERSION.to_le_bytes() {
        return Err(damaged("it was written by another version of rvm"));
    }
    if digest != Sha256::digest(body).as_slice() {
        return Err(damaged("it has changed since it was written"));
    }
    postcard::from_bytes(body).map_err(|_| damaged("it cannot be decoded"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file whose digest is right, whatever is in it.
    fn sealed(body: &[u8]) -> Vec<u8> {
        [&MAGIC[..], &VERSION.to_le_bytes(), &Sha256::digest(body), body].concat()
    }

    #[test]
    fn what_is_wrong_is_told() {
        let words = |bytes: &[u8]| unseal::<Record>(bytes).unwrap_err().to_string();
        assert!(words(b"").contains("too short"));
        assert!(words(&[0; 100]).contains("no machine"));
        assert!(words(&vec![0; MAX_LENGTH as usize + 1]).contains("too long"));
        let mut file = sealed(b"body");
        assert!(words(&file).contains("cannot be decoded"));
        file[8] += 1;
        assert!(words(&file).contains("another version"));
        file[8] -= 1;
        *file.last_mut().unwrap() += 1;
        assert!(words(&file).contains("has changed"));
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            let _ = unseal::<Record>(&bytes);
            let _ = unseal::<Record>(&sealed(&bytes));
        }
    }
}
