//! What a reward worker says of one position.

use uniarm_decode::guidance::{Term as DecodeTerm, TermLogits, TopList};

pub(crate) enum TermRow {
    List { list: TopList, log_normalizer: f32 },
    Whole { row: Vec<f32>, log_normalizer: f32 },
}

// === impl TermRow ===

impl TermRow {
    pub(crate) fn as_decode(&self, strength: f32, vocabulary: usize) -> DecodeTerm<'_> {
        let logits = match self {
            Self::List { list, .. } => TermLogits::List(list),
            Self::Whole { row, .. } => TermLogits::Dense(&row[..vocabulary]),
        };
        DecodeTerm { strength, logits }
    }

    pub(crate) fn is_whole(&self) -> bool {
        matches!(self, Self::Whole { .. })
    }

    /// Whether the row says this token's logit exactly.
    pub(crate) fn knows(&self, id: u32) -> bool {
        self.logit(id).is_some()
    }

    /// log π_reward(id), where the row knows it.
    pub(crate) fn log_probability(&self, id: u32) -> Option<f32> {
        let (Self::List { log_normalizer, .. } | Self::Whole { log_normalizer, .. }) = self;
        self.logit(id).map(|logit| logit - log_normalizer)
    }

    pub(crate) fn logit(&self, id: u32) -> Option<f32> {
        match self {
            Self::List { list, .. } => list.get(id),
            Self::Whole { row, .. } => row.get(id as usize).copied(),
        }
    }
}
