//! Two devices made one cable: whatever comes in at one goes out at the other (tc-mirred(8)).
//!
//! The container's address stays on the engine's device, where the engine looks for it, but the host's stack
//! never sees a frame: traffic control takes them before.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use nix::errno::Errno;

use super::netlink::Netlink;
use super::{NetworkError, share};

/// `ffff:`, the handle that an ingress queueing discipline always has.
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0 };

/// The place of the rule for everything in the row of its device. Before it come those of what the host's stack is to have.
const LAST: u16 = 100;

/// Sends all that comes in at either device out at the other.
pub fn join(netlink: &mut Netlink, one: u32, other: u32) -> Result<(), NetworkError> {
    for (from, to) in [(one, other), (other, one)] {
        // One that a killed container left behind would lead to a device that is gone.
        part(netlink, from).map_err(refused)?;
        // No bit of the one word is compared: it is there for every frame.
        let rule = Rule::lead(LAST, libc::ETH_P_ALL, selector(&[(0, 0, 0)]), to);
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        netlink.change(RouteNetlinkMessage::NewQueueDiscipline(ingress(from)), flags).map_err(refused)?;
        netlink
            .change(RouteNetlinkMessage::NewTrafficFilter(rule.to_message(from)), flags)
            .map_err(refused)?;
    }
    Ok(())
}

/// Whether somebody uses the device's incoming traffic: any rule counts, except the remains of a container of ours
/// that was killed, whose tap is gone.
pub fn is_taken(netlink: &mut Netlink, device: u32) -> Result<bool, NetworkError> {
    Ok(rules(netlink, device)?.iter().any(|rule| !leads_nowhere(rule) && !is_shared(rule)))
}

/// Whether all that is there for the device's incoming traffic are the remains of a container whose tap is gone.
pub fn is_left_behind(netlink: &mut Netlink, device: u32) -> Result<bool, NetworkError> {
    let rules = rules(netlink, device)?;
    Ok(rules.iter().any(leads_nowhere) && rules.iter().all(|rule| leads_nowhere(rule) || is_shared(rule)))
}

/// The rules for what comes in at a device.
fn rules(netlink: &mut Netlink, device: u32) -> Result<Vec<TcMessage>, NetworkError> {
    let mut request = TcMessage::with_index(device as i32);
    request.header.parent = INGRESS;
    let filters = match netlink.list(RouteNetlinkMessage::GetTrafficFilter(request)) {
        // The device has no ingress queueing discipline.
        Err(NetworkError::Read(cause)) if matches!(cause.errno(), Some(Errno::EINVAL | Errno::ENOENT)) => {
            return Ok(Vec::new());
        }
        filters => filters?,
    };
    let rules = filters.into_iter().filter_map(|filter| match filter {
        RouteNetlinkMessage::NewTrafficFilter(message) if !is_head(&message) => Some(message),
        _ => None,
    });
    Ok(rules.collect())
}

/// The kernel lists, besides the rules, the tables in which they are kept: those have no actions.
fn is_head(message: &TcMessage) -> bool {
    !message.attributes.iter().any(|attribute| {
        matches!(attribute, TcAttribute::Options(options)
        if options.iter().any(|option| !matches!(option, TcOption::U32(TcFilterU32Option::Divisor(_)))))
    })
}

/// A redirection whose target has vanished: the kernel gives its index as 0.
fn leads_nowhere(message: &TcMessage) -> bool {
    let targets: Vec<u32> = message.attributes.iter().flat_map(targets).collect();
    !targets.is_empty() && targets.iter().all(|target| *target == 0)
}

/// A rule of ours that lets frames pass to the host's stack.
fn is_shared(message: &TcMessage) -> bool {
    let priority = message.header.info >> 16;
    let mut selectors = message.attributes.iter().flat_map(|attribute| match attribute {
        TcAttribute::Options(options) => options.as_slice(),
        _ => &[],
    });
    selectors.any(|option| {
        matches!(option, TcOption::U32(TcFilterU32Option::Selector(selector))
            if share::passes().any(|rule| u32::from(rule.priority) == priority && rule.selector.keys == selector.keys))
    })
}

fn targets(attribute: &TcAttribute) -> Vec<u32> {
    let TcAttribute::Options(options) = attribute else { return Vec::new() };
    let actions = options.iter().filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    let options =
        actions.flatten().flat_map(|action| &action.attributes).filter_map(|attribute| match attribute {
            TcActionAttribute::Options(options) => Some(options),
            _ => None,
        });
    options
        .flatten()
        .filter_map(|option| match option {
            TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => Some(mirror.ifindex),
            _ => None,
        })
        .collect()
}

/// Undoes [`join`] at one device; one that was never joined is left as it is.
pub fn part(netlink: &mut Netlink, device: u32) -> io::Result<()> {
    match netlink.change(RouteNetlinkMessage::DelQueueDiscipline(ingress(device)), 0) {
        Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Err(error),
        _ => Ok(()),
    }
}

/// The kernel's refusal.
pub fn refused(error: io::Error) -> NetworkError {
    NetworkError::Redirect(error.into())
}

/// What becomes of some of the frames that come in at a device.
pub struct Rule {
    priority: u16,
    /// The Ethernet type (`ETH_P_*`).
    protocol: u16,
    selector: TcU32Selector,
    action: Option<TcAction>,
}

impl Rule {
    /// They go out at another device.
    pub fn lead(priority: u16, protocol: libc::c_int, selector: TcU32Selector, to: u32) -> Rule {
        let action = mirror(TcMirrorActionType::EgressRedir, TcActionType::Stolen, to);
        Rule { priority, protocol: protocol as u16, selector, action: Some(action) }
    }

    /// The host's stack gets them, and another device a copy.
    pub fn copy(priority: u16, protocol: libc::c_int, selector: TcU32Selector, to: u32) -> Rule {
        let action = mirror(TcMirrorActionType::EgressMirror, TcActionType::Ok, to);
        Rule { priority, protocol: protocol as u16, selector, action: Some(action) }
    }

    /// The host's stack gets them.
    pub fn pass(priority: u16, protocol: libc::c_int, selector: TcU32Selector) -> Rule {
        Rule { priority, protocol: protocol as u16, selector, action: None }
    }

    /// The rule for what comes in at this device.
    pub fn to_message(&self, device: u32) -> TcMessage {
        let mut message = TcMessage::with_index(device as i32);
        message.header.parent = INGRESS;
        // The two halves of `tcm_info`.
        message.header.info = u32::from(self.priority) << 16 | u32::from(self.protocol.to_be());
        let mut options = vec![TcOption::U32(TcFilterU32Option::Selector(self.selector.clone()))];
        match &self.action {
            Some(action) => options.push(TcOption::U32(TcFilterU32Option::Action(vec![action.clone()]))),
            // A rule without an action has to name a class, of which this discipline has none.
            None => options.push(TcOption::U32(TcFilterU32Option::ClassId(TcHandle { major: 0, minor: 1 }))),
        }
        message.attributes =
            vec![TcAttribute::Kind(TcFilterU32::KIND.to_owned()), TcAttribute::Options(options)];
        message
    }
}

fn mirror(kind: TcMirrorActionType, then: TcActionType, to: u32) -> TcAction {
    let mut generic = TcActionGeneric::default();
    generic.action = then;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = kind;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    action
}

/// Selects what has these values in these bits of the words at these offsets.
pub fn selector(words: &[(i32, u32, u32)]) -> TcU32Selector {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.keys = words.iter().map(|(offset, mask, value)| key(*offset, *mask, *value)).collect();
    // A handful of words.
    selector.nkeys = words.len() as u8;
    selector
}

fn key(offset: i32, mask: u32, value: u32) -> TcU32Key {
    let mut key = TcU32Key::default();
    (key.off, key.mask, key.val) = (offset, mask, value);
    key
}

fn ingress(device: u32) -> TcMessage {
    let mut message = TcMessage::with_index(device as i32);
    message.header.handle = INGRESS;
    message.header.parent = TcHandle::INGRESS;
    message.attributes.push(TcAttribute::Kind("ingress".to_owned()));
    message
}
