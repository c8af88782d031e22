//! New limits for the workload: sent to the agent, or before the start entered into the description.

use rvm_protocol::Request;
use serde_json::Value;

use super::clients::ClientId;
use super::commands::Pending;
use super::service::Service;
use crate::container::Step;
use crate::container::shape::memory_limit;
use crate::control::Answer;

impl Service {
    pub(super) fn on_update(&mut self, client: ClientId, resources: String) -> Result<(), String> {
        if self.step != Step::Created || self.start_asked {
            return self.forward(Request::Update { resources }, Pending::Simple(client));
        }
        let malformed = |error: serde_json::Error| format!("the resources cannot be understood: {error}");
        self.setup.guest_spec = with_resources(&self.setup.guest_spec, &resources).map_err(malformed)?;
        if let Some(limit) = memory_limit(&serde_json::from_str(&resources).map_err(malformed)?) {
            self.setup.shape.memory_limit = Some(limit);
        }
        self.clients.answer(client, &Answer::Done, &[]);
        Ok(())
    }
}

/// A description with other resources; those that are not given stay.
fn with_resources(spec: &str, resources: &str) -> serde_json::Result<String> {
    let mut spec: Value = serde_json::from_str(spec)?;
    enter(&mut spec["linux"]["resources"], serde_json::from_str(resources)?);
    serde_json::to_string(&spec)
}

fn enter(old: &mut Value, new: Value) {
    match (old, new) {
        (_, Value::Null) => {}
        (Value::Object(old), Value::Object(new)) => {
            for (name, value) in new {
                enter(old.entry(name).or_insert(Value::Null), value);
            }
        }
        (old, new) => *old = new,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_before_the_start_changes_what_it_names_in_the_description() {
        let spec = r#"{"linux":{"resources":{"memory":{"limit":1,"swap":2},"devices":[{"allow":false}]}}}"#;
        let changed =
            with_resources(spec, r#"{"memory":{"limit":5,"swap":null},"pids":{"limit":9}}"#).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&changed).unwrap(),
            serde_json::json!({"linux": {"resources": {
                "memory": {"limit": 5, "swap": 2}, "devices": [{"allow": false}], "pids": {"limit": 9}
            }}})
        );
        let none = with_resources(r#"{"linux":{}}"#, r#"{"pids":{"limit":9}}"#).unwrap();
        assert_eq!(none, r#"{"linux":{"resources":{"pids":{"limit":9}}}}"#);
        assert!(with_resources(spec, "{").is_err());
    }
}
