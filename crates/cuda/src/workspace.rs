//! Activations of a step on the device.

use uniarm_model::{Config, Division, Linear, ModelError};

use crate::device::Device;
use crate::locked::Locked;
use crate::memory::Growing;
use crate::sheet::Sheet;

/// Activations of a step's largest micro-batch, (tokens, …) each; grown to the largest step seen. Batches have them one after the
/// other.
pub(crate) struct Workspace {
    /// The residual stream: (tokens, hidden)
    residual: Growing<f32>,
    /// (tokens, hidden)
    normed: Growing<f32>,
    /// (tokens, own queries + 2 × own keys)
    qkv: Growing<f32>,
    /// (tokens, queries)
    attended: Growing<f32>,
    /// (tokens, 2 × own intermediate)
    gate_up: Growing<f32>,
    /// (tokens, intermediate)
    gated: Growing<f32>,
    /// A · x of adapters: (adapted tokens, ranks)
    features: Growing<f32>,
    /// Normalised rows of all wanted tokens of the step: (wanted tokens, hidden)
    last: Growing<f32>,
    /// (wanted tokens, vocabulary)
    logits: Growing<f32>,
    /// Where a stage has several ranks, rows of any of these in parts.
    parts: Growing<f32>,
    /// On the host: rows of logits on their way from the device.
    inbox: Locked<f32>,
}

/// What there has to be room for, besides.
#[derive(Clone, Copy)]
pub(crate) struct Room {
    /// Tokens of the step whose logits this rank computes.
    pub wanted: usize,
    /// Rows of logits that it computes or gets.
    pub logits: usize,
    /// Numbers of them that come to the host.
    pub read: usize,
    /// Whether other ranks have parts of its rows.
    pub in_parts: bool,
}

/// Where the activations of this step lie.
pub(crate) struct Buffers {
    pub residual: u64,
    pub normed: u64,
    pub qkv: u64,
    pub attended: u64,
    pub gate_up: u64,
    pub gated: u64,
    pub features: u64,
    pub last: u64,
    pub logits: u64,
    pub parts: u64,
}

impl Workspace {
    pub const fn new() -> Self {
        Self {
            residual: Growing::new(),
            normed: Growing::new(),
            qkv: Growing::new(),
            attended: Growing::new(),
            gate_up: Growing::new(),
            gated: Growing::new(),
            features: Growing::new(),
            last: Growing::new(),
            logits: Growing::new(),
            parts: Growing::new(),
            inbox: Locked::new(),
        }
    }

    /// Copies so many of the step's logits from the device, the first ones.
    pub fn read_logits(&mut self, device: &Device, count: usize) -> Result<(), ModelError> {
        self.logits.read(device, self.inbox.reserve(device.stream(), count)?)
    }

    /// Those that were copied, when the device has finished.
    pub fn logits(&self, count: usize) -> &[f32] {
        self.inbox.numbers(count)
    }

    /// Room for a step, before anything of it is computed: former pages of the host are given back when the stream is idle, and
    /// later it may wait for a peer.
    pub fn reserve(
        &mut self,
        device: &Device,
        (config, division): (&Config, &Division),
        (batches, room): (&[Sheet], Room),
    ) -> Result<Buffers, ModelError> {
        let most = |count: fn(&Sheet) -> usize| batches.iter().map(count).max().unwrap_or(0);
        let (adapted, ranks) = (most(|sheet| sheet.adapted), most(Sheet::ranks_max));
        // Steps of nearly one size shall not each allocate.
        let tokens = most(|sheet| sheet.tokens).next_power_of_two();
        let [wanted, rows] = [room.wanted, room.logits].map(usize::next_power_of_two);
        let Config { hidden, intermediate, vocabulary, heads, head_dim, .. } = *config;
        let own = |linear: Linear| division.outputs(linear).rows.len();
        let reserve = |memory: &mut Growing<f32>, numbers: usize| {
            memory.reserve(device, numbers, "a step's activations").map(|memory| memory.at(0))
        };
        if room.read > 0 {
            self.inbox.reserve(device.stream(), room.read)?;
        }
        let gathered = tokens * hidden.max(heads * head_dim).max(intermediate);
        Ok(Buffers {
            residual: reserve(&mut self.residual, tokens * hidden)?,
            normed: reserve(&mut self.normed, tokens * hidden)?,
            qkv: reserve(&mut self.qkv, tokens * (own(Linear::Query) + 2 * own(Linear::Key)))?,
            attended: reserve(&mut self.attended, tokens * heads * head_dim)?,
            gate_up: reserve(&mut self.gate_up, tokens * 2 * own(Linear::Gate))?,
            gated: reserve(&mut self.gated, tokens * intermediate)?,
            features: match adapted {
                0 => 0,
                _ => reserve(&mut self.features, tokens * ranks)?,
            },
            last: match room.wanted {
                0 => 0,
                _ => reserve(&mut self.last, wanted * hidden)?,
            },
            logits: match room.logits {
                0 => 0,
                _ => reserve(&mut self.logits, rows * vocabulary)?,
            },
            parts: match room.in_parts {
                false => 0,
                true => reserve(&mut self.parts, gathered.max(rows * vocabulary))?,
            },
        })
    }
}
