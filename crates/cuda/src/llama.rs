//! A Llama or Qwen2 model on a GPU: what it takes of the device, and how it is loaded.

use uniarm_model::{Config, Forward, Limits, ModelError, ModelFiles, Plan, RopeTable, Row};

use crate::adapters::Adapters;
use crate::device::Device;
use crate::memory::Memory;
use crate::sheet::Sheet;
use crate::step::Workspace;
use crate::weights::{LlamaWeights, WeightFormat};

/// Rows are read 16 bytes at a time, two reads to a lane for the narrowest numbers.
const VECTOR: usize = 16;

/// As in `kernels/attention.cu`.
const HEAD_DIM_MAX: usize = 256;

/// What a model takes of the device.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// Which GPU, counted from 0 among those that the process sees.
    pub device: usize,
    /// Blocks of the cache.
    pub kv_blocks: usize,
    /// Positions per block, a multiple of 16.
    pub block_tokens: usize,
    pub weights: WeightFormat,
}

/// A loaded model with its cache.
pub struct CudaLlama {
    pub(crate) config: Config,
    pub(crate) weights: LlamaWeights,
    pub(crate) rope: Rope,
    pub(crate) cache: Cache,
    pub(crate) workspace: Workspace,
    pub(crate) sheet: Sheet,
    adapters: Adapters,
    plan: Plan,
    fingerprint: [u8; 32],
    /// The last one to go: memory is given back through it.
    pub(crate) device: Device,
}

/// Angles of all positions: (positions, head_dim / 2) each.
pub(crate) struct Rope {
    pub cosine: Memory<f32>,
    pub sine: Memory<f32>,
}

/// Keys and values: (layers, slots, kv_heads × head_dim) each.
pub(crate) struct Cache {
    keys: Memory<f32>,
    values: Memory<f32>,
    pub blocks: usize,
    pub block_tokens: usize,
    /// Numbers of a layer.
    layer: usize,
}

impl CudaLlama {
    /// Compiles the kernels, copies the weights and reserves the cache.
    ///
    /// # Errors
    /// [`ModelError::Device`] for a driver, a compiler or a device that is missing, or has no room;
    /// [`ModelError::Unsupported`] for dimensions that the kernels do not take; [`ModelError::Invalid`] for options that
    /// make no model; whatever reading the weights meets.
    pub fn load(files: &ModelFiles, options: &CudaOptions) -> Result<Self, ModelError> {
        let config = files.config.clone();
        check(files, options)?;
        let device = Device::open(options.device)?;
        let slots = options.kv_blocks * options.block_tokens;
        Ok(Self {
            weights: LlamaWeights::load(&device, files, options.weights)?,
            rope: Rope::load(&device, &config, slots)?,
            cache: Cache::reserve(&device, &config, options)?,
            workspace: Workspace::new(),
            sheet: Sheet::new(),
            adapters: Adapters::default(),
            plan: Plan::new(slots),
            fingerprint: files.fingerprint,
            config,
            device,
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// [`ModelFiles::fingerprint`] of the weights.
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// The device's name, as its driver has it.
    pub fn device_name(&self) -> &str {
        self.device.name()
    }

    /// Bytes per second that the device's memory gives at most; none where its driver does not say.
    pub fn bandwidth(&self) -> Option<f64> {
        self.device.bandwidth()
    }

    /// Bytes that a step over few rows reads: all matrices once.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Bytes of one cache block over all layers.
    pub fn block_bytes(&self) -> usize {
        block_bytes(&self.config, self.cache.block_tokens)
    }

    fn limits(&self) -> Limits {
        Limits {
            vocabulary: self.config.vocabulary,
            context_tokens: self.config.context_tokens,
            block_tokens: self.cache.block_tokens,
            blocks: self.cache.blocks,
        }
    }
}

impl Forward for CudaLlama {
    fn vocabulary(&self) -> usize {
        self.config.vocabulary
    }

    fn context_tokens(&self) -> usize {
        self.config.context_tokens
    }

    fn block_tokens(&self) -> usize {
        self.cache.block_tokens
    }

    fn blocks(&self) -> usize {
        self.cache.blocks
    }

    fn forward(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let wanted = self.plan.prepare(rows, &self.limits(), &self.config)?;
        if rows.is_empty() {
            logits.clear();
            return Ok(());
        }
        let Self { device, config, sheet, adapters, plan, .. } = self;
        sheet.fill((device, config), (plan, rows), adapters)?;
        logits.resize(wanted * self.config.vocabulary, 0.0);
        self.step(logits)
    }
}

impl Rope {
    fn load(device: &Device, config: &Config, slots: usize) -> Result<Self, ModelError> {
        let table = RopeTable::new(&config.rope, config.head_dim, config.context_tokens.min(slots));
        let (cosine, sine) = table.tables();
        let upload = |numbers| Memory::of(device, numbers, "rotary angles");
        Ok(Self { cosine: upload(cosine)?, sine: upload(sine)? })
    }
}

impl Cache {
    fn reserve(device: &Device, config: &Config, options: &CudaOptions) -> Result<Self, ModelError> {
        let CudaOptions { kv_blocks: blocks, block_tokens, .. } = *options;
        let layer = blocks * block_tokens * config.kv_heads * config.head_dim;
        let reserve = || Memory::reserve(device, config.layers * layer, "half of the cache");
        Ok(Self { keys: reserve()?, values: reserve()?, blocks, block_tokens, layer })
    }

    /// Where keys and values of a layer begin.
    pub fn layer(&self, layer: usize) -> (u64, u64) {
        (self.keys.at(layer * self.layer), self.values.at(layer * self.layer))
    }
}

fn block_bytes(config: &Config, block_tokens: usize) -> usize {
    2 * config.layers * block_tokens * config.kv_heads * config.head_dim * size_of::<f32>()
}

fn check(files: &ModelFiles, options: &CudaOptions) -> Result<(), ModelError> {
    let config = &files.config;
    let dimensions = [
        ("hidden size", config.hidden),
        ("head dimension", config.head_dim),
        ("intermediate size", config.intermediate),
    ];
    let unsupported =
        |feature| Err(ModelError::Unsupported { file: files.weights.path().to_owned(), feature });
    if let Some((what, size)) = dimensions.into_iter().find(|(_, size)| !size.is_multiple_of(VECTOR)) {
        return unsupported(format!("a {what} of {size} (not a multiple of {VECTOR})"));
    }
    if config.head_dim > HEAD_DIM_MAX {
        return unsupported(format!(
            "a head dimension of {} (over {HEAD_DIM_MAX}) on a GPU",
            config.head_dim
        ));
    }
    let CudaOptions { kv_blocks, block_tokens, .. } = *options;
    let invalid = |field, reason| Err(ModelError::Invalid { field, reason });
    if block_tokens == 0 || !block_tokens.is_multiple_of(VECTOR) {
        return invalid("block_tokens", format!("{block_tokens} is not a multiple of {VECTOR}"));
    }
    // Kernels count slots in 31 bits.
    let slots = kv_blocks.checked_mul(block_tokens).filter(|slots| *slots <= i32::MAX as usize);
    if kv_blocks == 0 || slots.is_none() {
        return invalid("kv_blocks", format!("a cache of {kv_blocks} blocks of {block_tokens} positions"));
    }
    Ok(())
}

/// Engines move models between threads.
const _: () = {
    const fn sent<T: Send>() {}
    sent::<CudaLlama>();
};
