//! Limits and hints that a microVM cannot honour as other runtimes do: refused, or without effect and said so.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::error::BundleError;
use super::impossible;

/// Checks the limits of a description, or of an update. `prefix` is where they stand in it.
pub fn check(
    resources: &LinuxResources,
    prefix: &str,
    warnings: &mut Vec<String>,
) -> Result<(), BundleError> {
    if let Some(memory) = resources.memory() {
        check_memory(memory, prefix, warnings);
    }
    if let Some(cpu) = resources.cpu() {
        check_cpu(cpu, prefix)?;
    }
    if let Some(io) = resources.block_io() {
        check_io(io, prefix)?;
    }
    let network = resources.network().as_ref();
    let class = network.and_then(|network| network.class_id()).is_some_and(|class| class != 0);
    let priorities =
        network.and_then(|network| network.priorities().as_ref()).is_some_and(|list| !list.is_empty());
    let rdma = resources.rdma().as_ref().is_some_and(|devices| !devices.is_empty());
    let ignored = [
        ("network.classID", class, "the host sees no sockets of a guest that it could mark"),
        ("network.priorities", priorities, "the host sees no sockets of a guest that it could mark"),
        ("rdma", rdma, "it is about the host's hardware"),
    ];
    for (name, present, why) in ignored {
        if present {
            warnings.push(format!("{prefix}.{name} is ignored: {why}"));
        }
    }
    Ok(())
}

fn check_memory(memory: &LinuxMemory, prefix: &str, warnings: &mut Vec<String>) {
    let positive = |limit: Option<i64>| limit.is_some_and(|limit| limit > 0);
    let counted = "the guest's kernel counts this memory in memory.limit";
    let ignored = [
        ("swappiness", memory.swappiness().is_some(), "the guest has no swap"),
        (
            "disableOOMKiller",
            memory.disable_oom_killer() == Some(true),
            "a guest without memory could not even be stopped",
        ),
        ("kernel", positive(memory.kernel()), counted),
        ("kernelTCP", positive(memory.kernel_tcp()), counted),
        ("useHierarchy", memory.use_hierarchy() == Some(false), "limits always hold for all that is below"),
        (
            "checkBeforeUpdate",
            memory.check_before_update() == Some(true),
            "a limit below what is in use is set, and memory is reclaimed",
        ),
    ];
    for (name, present, why) in ignored {
        if present {
            warnings.push(format!("{prefix}.memory.{name} is ignored: {why}"));
        }
    }
}

fn check_cpu(cpu: &LinuxCpu, prefix: &str) -> Result<(), BundleError> {
    let real_time = [
        ("realtimeRuntime", cpu.realtime_runtime().is_some_and(|time| time != 0)),
        ("realtimePeriod", cpu.realtime_period().is_some_and(|time| time != 0)),
    ];
    match real_time.into_iter().find(|(_, present)| *present) {
        None => Ok(()),
        Some((name, _)) => Err(impossible(
            &format!("{prefix}.cpu.{name}"),
            "promise real-time processor time, since the guest's processors are threads of the host",
        )),
    }
}

fn check_io(io: &LinuxBlockIo, prefix: &str) -> Result<(), BundleError> {
    let of_a_device = io.weight_device().iter().flatten().any(|device| is_set(device.leaf_weight()));
    if is_set(io.leaf_weight()) || of_a_device {
        return Err(impossible(
            &format!("{prefix}.blockIO.leafWeight"),
            "weigh leaves; no scheduler of Linux 5.0 and later does",
        ));
    }
    Ok(())
}

fn is_set(weight: Option<u16>) -> bool {
    weight.is_some_and(|weight| weight != 0)
}
