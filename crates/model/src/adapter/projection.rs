//! The linear layers of a backbone that an adapter may sit on, and how their names match PEFT's targets.

use super::{Backbone, Group};
use crate::config::Config;

/// A linear layer that can be adapted.
pub(super) struct Projection {
    /// Name within a layer.
    pub(super) name: &'static str,
    pub(super) group: Group,
    /// First output among those of its group.
    pub(super) column: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// Linear layers in the order of the state, by their names within a layer.
pub(super) const NAMES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

pub(super) fn projections(config: &Config) -> [Projection; 7] {
    let Backbone { hidden, queries, keys, intermediate, .. } = Backbone::of(config);
    let mut names = NAMES.into_iter();
    let mut projection = |group, column, outputs, inputs| Projection {
        name: names.next().expect("seven names"),
        group,
        column,
        outputs,
        inputs,
    };
    [
        projection(Group::Qkv, 0, queries, hidden),
        projection(Group::Qkv, queries, keys, hidden),
        projection(Group::Qkv, queries + keys, keys, hidden),
        projection(Group::Output, 0, hidden, queries),
        projection(Group::GateUp, 0, intermediate, hidden),
        projection(Group::GateUp, intermediate, intermediate, hidden),
        projection(Group::Down, 0, hidden, intermediate),
    ]
}

/// "q_proj" of "self_attn.q_proj".
pub(super) fn short(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// PEFT matches a target by the end of the module's name.
pub(super) fn matches(target: &str, name: &str) -> bool {
    target == name || target == short(name)
}
