//! How long a guest that is up may take to start the container.

use std::time::Duration;

use oci_spec::runtime::Spec;

/// Network, mounts and process of the container. Far above what the slowest host needs: it only ends what would hang
/// for ever.
const START: Duration = Duration::from_secs(180);

/// How long the guest may take to answer the start; none where hooks of the container may take as long as they like.
pub fn of_start(spec: &Spec) -> Option<Duration> {
    let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.start_container().as_deref());
    hooks.unwrap_or_default().iter().try_fold(START, |patience, hook| {
        let seconds = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok())?;
        patience.checked_add(Duration::from_secs(seconds))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn patience(hooks: &Value) -> Option<Duration> {
        of_start(&serde_json::from_value(json!({"ociVersion": "1.0.2", "hooks": hooks})).unwrap())
    }

    #[test]
    fn hooks_that_run_in_the_container_get_their_time() {
        assert_eq!(patience(&json!(null)), Some(START));
        let limited = json!({"path": "/hook", "timeout": 30});
        let two = json!({"startContainer": [limited, limited], "poststart": [{"path": "/hook"}]});
        assert_eq!(patience(&two), Some(START + Duration::from_secs(60)));
    }

    #[test]
    fn a_hook_without_a_limit_may_take_for_ever() {
        let unlimited = json!({"startContainer": [{"path": "/hook", "timeout": 30}, {"path": "/hook"}]});
        assert_eq!(patience(&unlimited), None);
        let absurd = json!({"startContainer": [{"path": "/hook", "timeout": i64::MAX}]});
        assert!(patience(&absurd).is_some_and(|patience| patience > START));
    }
}
