//! Adapters of a frozen backbone (MoSLoRA, PBLoRA, LoRA) and their state under one preference.

use std::sync::Arc;

/// An adapter under one preference: what a row of a batch carries. A clone is two reference counts.
#[derive(Clone)]
pub struct Conditioned {
    key: u64,
    #[allow(dead_code)]
    state: Arc<[f32]>,
}

impl Conditioned {
    /// Identifies (adapter weights, preference): rows with equal keys may share cache blocks.
    pub fn key(&self) -> u64 {
        self.key
    }
}

impl std::fmt::Debug for Conditioned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conditioned").field("key", &self.key).finish_non_exhaustive()
    }
}
