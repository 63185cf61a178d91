//! Which outputs of which matrix a rank of a sharded model holds.
//!
//! Matrices are divided by outputs alone, and every product sees its whole input, which the ranks gather before it. So
//! each output is the dot product that it is in one process, and the logits have the same bits for any number of
//! ranks. The usual division (outputs, then inputs of the next matrix, and a sum over ranks) has two sums a layer in place of
//! four gathers, and other bits for each number of ranks.
//!
//! **The rule**: query heads, the hidden size, the intermediate size and the vocabulary are cut into as many contiguous and
//! nearly equal ranges as there are ranks. A rank holds the key-value heads that its query heads read: where a cut goes
//! through a group of query heads, both sides hold its key-value head.
//!
//! **Stages** cut the layers: each has a contiguous range of them, and ranks of its own that divide these. What goes from one
//! stage to the next is the sum that the next layer would have begun with, so no bit depends on where layers are cut either.
//! The first stage has the embeddings, the last one the output projection.

use std::ops::Range;

use crate::config::Config;
use crate::error::ModelError;
use crate::kernels::simd::LANES;

/// The linear layers of a block, in the order in which an adapter's state has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linear {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

/// Which part of a model a process of a group holds. With stages the first ranks are the first stage, and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub rank: usize,
    /// Ranks of all stages.
    pub size: usize,
    /// Ranges of layers, each on as many ranks; 1 where every rank has its part of every layer.
    pub stages: usize,
}

/// One rank's part of the layers of its stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Division {
    /// Query heads.
    pub heads: Range<usize>,
    /// Those that `heads` read.
    pub kv_heads: Range<usize>,
    pub vocabulary: Range<usize>,
    head_dim: usize,
    hidden: Range<usize>,
    intermediate: Range<usize>,
}

/// The outputs of a linear layer that a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outputs {
    /// Among all of the layer.
    pub rows: Range<usize>,
    /// The first one's place among the rank's outputs of layers that share their input.
    pub column: usize,
}

/// What the columns of gathered rows are, and with that whose they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    Queries,
    Hidden,
    Intermediate,
    Vocabulary,
}

impl Linear {
    pub const ALL: [Self; 7] =
        [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// Name within a layer.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Outputs over all ranks.
    pub fn outputs(self, config: &Config) -> usize {
        match self {
            Self::Query => config.heads * config.head_dim,
            Self::Key | Self::Value => config.kv_heads * config.head_dim,
            Self::Output | Self::Down => config.hidden,
            Self::Gate | Self::Up => config.intermediate,
        }
    }
}

impl From<(usize, usize)> for Part {
    /// Rank and size of a group of one stage.
    fn from((rank, size): (usize, usize)) -> Self {
        Self { rank, size, stages: 1 }
    }
}

impl Part {
    /// All of it.
    pub const WHOLE: Self = Self { rank: 0, size: 1, stages: 1 };

    /// # Errors
    /// [`ModelError::Invalid`] for a rank that is none, and for stages that do not divide ranks or layers.
    pub fn check(&self, config: &Config) -> Result<(), ModelError> {
        let Self { rank, size, stages } = *self;
        let invalid = |field, reason| Err(ModelError::Invalid { field, reason });
        if rank >= size {
            return invalid("rank", format!("rank {rank} of {size}; ranks are counted from 0"));
        }
        if stages == 0 || !size.is_multiple_of(stages) {
            return invalid("stages", format!("{size} ranks are not a multiple of {stages} stages"));
        }
        if stages > config.layers {
            let layers = config.layers;
            return invalid(
                "stages",
                format!("{stages} stages share this model's {layers} layers: at most {layers} can"),
            );
        }
        Ok(())
    }

    /// Ranks of a stage.
    pub fn ranks(&self) -> usize {
        self.size / self.stages
    }

    pub(crate) fn stage(&self) -> usize {
        self.rank / self.ranks()
    }

    /// Its place among the ranks of its stage.
    pub fn place(&self) -> usize {
        self.rank % self.ranks()
    }

    /// The ranks of its stage.
    pub fn members(&self) -> Range<usize> {
        let first = self.stage() * self.ranks();
        first..first + self.ranks()
    }

    /// The ranks of the last stage, which have the logits.
    pub fn last_members(&self) -> Range<usize> {
        self.size - self.ranks()..self.size
    }

    pub fn is_first_stage(&self) -> bool {
        self.stage() == 0
    }

    pub fn is_last_stage(&self) -> bool {
        self.stage() + 1 == self.stages
    }

    /// Names of the tables that its stage reads: of embeddings, and of the output projection. Where the latter is tied to
    /// the former there is one table, named as the output projection, which the first stage takes embeddings from.
    pub fn tables(&self, config: &Config) -> [Option<&'static str>; 2] {
        const EMBEDDINGS: &str = "model.embed_tokens.weight";
        let (first, last) = (self.is_first_stage(), self.is_last_stage());
        match config.tied_embeddings {
            true => [None, (first || last).then_some(EMBEDDINGS)],
            false => [first.then_some(EMBEDDINGS), last.then_some("lm_head.weight")],
        }
    }

    /// Layers of its stage.
    pub fn layers(&self, config: &Config) -> Range<usize> {
        config.layers * self.stage() / self.stages..config.layers * (self.stage() + 1) / self.stages
    }
}

impl Division {
    /// For the rank at this place of so many that divide a layer.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] for more ranks than there is something to divide into.
    pub fn new(config: &Config, rank: usize, size: usize) -> Result<Self, ModelError> {
        let limits = [
            ("query heads", config.heads),
            ("vectors in its hidden size", config.hidden / LANES),
            ("vectors in its intermediate size", config.intermediate / LANES),
            ("tokens", config.vocabulary),
        ];
        if let Some((what, count)) = limits.into_iter().find(|(_, count)| size > 1 && *count < size) {
            let reason = format!("{size} ranks share this model's {count} {what}: at most {count} ranks can");
            return Err(ModelError::Invalid { field: "size", reason });
        }
        let part = |count: usize| count * rank / size..count * (rank + 1) / size;
        let vectors = |count: usize| {
            let part = part(count / LANES);
            part.start * LANES..part.end * LANES
        };
        let (heads, group) = (part(config.heads), config.heads / config.kv_heads);
        Ok(Self {
            kv_heads: heads.start / group..heads.end.div_ceil(group),
            heads,
            vocabulary: part(config.vocabulary),
            head_dim: config.head_dim,
            hidden: vectors(config.hidden),
            intermediate: vectors(config.intermediate),
        })
    }

    /// Those of all ranks of a stage, by place.
    ///
    /// # Errors
    /// As [`Division::new`].
    pub fn of_stage(config: &Config, part: Part) -> Result<Vec<Self>, ModelError> {
        (0..part.ranks()).map(|place| Self::new(config, place, part.ranks())).collect()
    }

    /// Its columns of gathered rows.
    pub fn columns(&self, columns: Columns) -> Range<usize> {
        match columns {
            Columns::Queries => self.outputs(Linear::Query).rows,
            Columns::Hidden => self.outputs(Linear::Output).rows,
            Columns::Intermediate => self.outputs(Linear::Gate).rows,
            Columns::Vocabulary => self.vocabulary.clone(),
        }
    }

    /// Its outputs of a linear layer.
    pub fn outputs(&self, linear: Linear) -> Outputs {
        let dims = |heads: &Range<usize>| heads.start * self.head_dim..heads.end * self.head_dim;
        let (queries, keys) = (dims(&self.heads), dims(&self.kv_heads));
        let (rows, column) = match linear {
            Linear::Query => (queries, 0),
            Linear::Key => (keys, queries.len()),
            Linear::Value => {
                let column = queries.len() + keys.len();
                (keys, column)
            }
            Linear::Output | Linear::Down => (self.hidden.clone(), 0),
            Linear::Gate => (self.intermediate.clone(), 0),
            Linear::Up => (self.intermediate.clone(), self.intermediate.len()),
        };
        Outputs { rows, column }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Architecture, Rope, RopeScaling};

    /// The heads of SmolLM2-135M.
    fn config() -> Config {
        Config {
            architecture: Architecture::Llama,
            vocabulary: 49_152,
            hidden: 576,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            intermediate: 1536,
            context_tokens: 8192,
            rms_norm_epsilon: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            tied_embeddings: true,
            qkv_bias: false,
            bos: None,
            eos: Vec::new(),
        }
    }

    #[test]
    fn ranks_cover_every_output_once_and_hold_the_key_value_heads_they_read() {
        let config = config();
        for size in 1..=9 {
            let ranks: Vec<Division> =
                (0..size).map(|rank| Division::new(&config, rank, size).expect("a division")).collect();
            for linear in [Linear::Query, Linear::Output, Linear::Gate, Linear::Up, Linear::Down] {
                let mut next = 0;
                for rank in &ranks {
                    let rows = rank.outputs(linear).rows;
                    assert_eq!(rows.start, next, "{linear:?} of {size} ranks");
                    assert!(!rows.is_empty());
                    next = rows.end;
                }
                assert_eq!(next, linear.outputs(&config), "{linear:?} of {size} ranks");
            }
            for Division { heads, kv_heads, .. } in &ranks {
                assert!(heads.clone().all(|head| kv_heads.contains(&(head / 3))), "{heads:?}: {kv_heads:?}");
            }
        }
        let four: Vec<_> = (0..4).map(|rank| Division::new(&config, rank, 4).expect("a division")).collect();
        let heads: Vec<_> = four.iter().map(|rank| (rank.heads.clone(), rank.kv_heads.clone())).collect();
        assert_eq!(heads, [(0..2, 0..1), (2..4, 0..2), (4..6, 1..2), (6..9, 2..3)]);
    }

    #[test]
    fn stages_cover_every_layer_once_and_ranks_of_a_stage_stand_together() {
        for (stages, ranks) in [(1, 4), (2, 1), (3, 2), (7, 1), (30, 2)] {
            let size = stages * ranks;
            let mut next = 0;
            for rank in 0..size {
                let part = Part { rank, size, stages };
                part.check(&config()).expect("a part");
                let layers = part.layers(&config());
                assert!(!layers.is_empty());
                assert_eq!((part.stage(), part.place()), (rank / ranks, rank % ranks));
                assert_eq!(
                    (part.is_first_stage(), part.is_last_stage()),
                    (rank < ranks, rank >= size - ranks)
                );
                assert_eq!(layers.start, next, "rank {rank} of {size} in {stages} stages");
                if part.place() + 1 == ranks {
                    next = layers.end;
                }
            }
            assert_eq!(next, config().layers);
        }
    }

    #[test]
    fn more_ranks_than_heads_are_refused_with_both_numbers() {
        let refused = |rank, size| Division::new(&config(), rank, size).expect_err("no division").to_string();
        let sentence = refused(0, 10);
        assert!(sentence.contains("10 ranks share this model's 9 query heads"), "{sentence}");
        let refused = |rank, size, stages| {
            Part { rank, size, stages }.check(&config()).expect_err("no part").to_string()
        };
        assert!(refused(4, 4, 1).contains("rank 4 of 4"));
        assert!(refused(0, 0, 1).contains("rank 0 of 0"));
        assert!(refused(0, 3, 2).contains("3 ranks are not a multiple of 2 stages"));
        assert!(refused(0, 2, 0).contains("2 ranks are not a multiple of 0 stages"));
        let sentence = refused(0, 31, 31);
        assert!(sentence.contains("31 stages share this model's 30 layers"), "{sentence}");
    }
}
