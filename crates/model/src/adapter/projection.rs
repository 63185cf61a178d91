//! The linear layers of a backbone that an adapter may sit on, and how their names match PEFT's targets.

use super::{Backbone, Group};
use crate::config::Config;
use crate::division::Linear;

/// A linear layer that can be adapted.
pub(super) struct Projection {
    pub(super) linear: Linear,
    /// Name within a layer.
    pub(super) name: &'static str,
    pub(super) group: Group,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// Linear layers in the order of the state, by their names within a layer.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    Linear::ALL.into_iter().map(Linear::name)
}

pub(super) fn projections(config: &Config) -> [Projection; 7] {
    let Backbone { hidden, queries, intermediate, .. } = Backbone::of(config);
    Linear::ALL.map(|linear| {
        let (group, inputs) = match linear {
            Linear::Query | Linear::Key | Linear::Value => (Group::Qkv, hidden),
            Linear::Output => (Group::Output, queries),
            Linear::Gate | Linear::Up => (Group::GateUp, hidden),
            Linear::Down => (Group::Down, intermediate),
        };
        Projection { linear, name: linear.name(), group, outputs: linear.outputs(config), inputs }
    })
}

/// "q_proj" of "self_attn.q_proj".
pub(super) fn short(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// PEFT matches a target by the end of the module's name.
pub(super) fn matches(target: &str, name: &str) -> bool {
    target == name || target == short(name)
}
