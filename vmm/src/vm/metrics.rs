//! What a VM has done so far, gathered from those who count.

use std::fmt::{Display, Write};

use api::State;
use serde_json::{Map, Value, json};

use crate::machine::Machine;

/// Every device's counters by its id, and the exits of all vCPUs by kind.
pub(crate) fn counters(machine: &Machine) -> Value {
    let mut all = Map::new();
    all.insert("exits".into(), json!(machine.exits()));
    for (id, counters) in machine.devices() {
        all.insert(id.into(), json!(*counters));
    }
    Value::Object(all)
}

/// The VM's metrics as Prometheus reads them (text format 0.0.4).
pub(crate) fn text(state: State, machine: Option<&Machine>) -> String {
    let mut text = String::new();
    metric(
        &mut text,
        "podvmm_vm_state",
        "gauge",
        [(format!("state=\"{state}\""), 1)],
    );
    let Some(machine) = machine else {
        return text;
    };
    let exits = fields(&json!(machine.exits()));
    let exits = exits.map(|(kind, count)| (format!("kind=\"{kind}\""), count));
    metric(&mut text, "podvmm_vcpu_exits_total", "counter", exits);
    let devices: Vec<_> = machine
        .devices()
        .map(|(id, counters)| (id, json!(*counters)))
        .collect();
    let Some((_, first)) = devices.first() else {
        return text;
    };
    for (name, _) in fields(first) {
        let values = devices.iter().map(|(id, counters)| {
            let count = counters[&name].as_u64().unwrap_or_default();
            (format!("device=\"{id}\""), count)
        });
        metric(
            &mut text,
            &format!("podvmm_device_{name}_total"),
            "counter",
            values,
        );
    }
    text
}

fn fields(object: &Value) -> impl Iterator<Item = (String, u64)> + use<> {
    let fields = object.as_object().cloned().unwrap_or_default();
    fields
        .into_iter()
        .map(|(name, count)| (name, count.as_u64().unwrap_or_default()))
}

fn metric<V: Display>(
    text: &mut String,
    name: &str,
    kind: &str,
    values: impl IntoIterator<Item = (String, V)>,
) {
    let _ = writeln!(text, "# TYPE {name} {kind}");
    for (label, value) in values {
        let _ = writeln!(text, "{name}{{{label}}} {value}");
    }
}
