//! The Llama family with a trainable adapter: log-probabilities of pairs, and the gradient of their loss.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use uniarm_model::{Config, ModelFiles};

use super::adapter::{AdapterConfig, Conditioning, Method, Projection};
use super::batch::Packed;
use super::modulation::{Modulated, Rows};
use super::ops::{Attention, Form, Mlp, attention, frozen_linear, log_probabilities, mlp, rms_norm};
use super::{Network, Parameter, Sample};
use crate::loss::{Loss, LossValue};

/// How the network runs.
#[derive(Clone, Debug)]
pub struct NetworkOptions {
    pub device: Device,
    pub form: Form,
    /// Keep only the input of each layer, and compute the rest again for the gradient: less memory, a third more
    /// arithmetic.
    pub checkpoint_activations: bool,
    /// Of the adapter's initial values.
    pub seed: u64,
    /// o_i, (objectives, width), where the model's own token embeddings are not to make them.
    pub objective_embeddings: Option<Vec<f32>>,
}

/// A frozen backbone in f32 and the adapter that is trained over it.
pub struct LlamaNetwork {
    config: Config,
    fingerprint: [u8; 32],
    adapter: AdapterConfig,
    options: NetworkOptions,
    /// On the CPU: only the rows of a batch go to a device.
    embedding: Tensor,
    head: Tensor,
    norm: Tensor,
    layers: Vec<Layer>,
    frequencies: Vec<f64>,
    layout: Vec<Parameter>,
    parameters: Vec<f32>,
    /// One for each parameter, in the order of the layout.
    variables: Vec<Var>,
    /// o_i, (objectives, width); empty unless text conditions the adapter.
    embeddings: Vec<f32>,
}

struct Layer {
    norm: Tensor,
    linears: Vec<Linear>,
    mlp: Mlp,
}

/// A frozen linear layer of the attention or, where an adapter sits there, of the feed-forward block.
struct Linear {
    name: &'static str,
    weight: Tensor,
    bias: Option<Tensor>,
    /// Index of its first variable.
    adapter: Option<usize>,
}

/// What every layer of one pass needs.
struct Pass<'a> {
    rows: Rows<'a>,
    attention: Arc<Attention>,
    predictions: &'a [(u32, u32)],
}

// === impl NetworkOptions ===

impl Default for NetworkOptions {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            form: Form::Fast,
            checkpoint_activations: false,
            seed: 0,
            objective_embeddings: None,
        }
    }
}

// === impl LlamaNetwork ===

impl LlamaNetwork {
    /// Reads the weights, widened to f32, and begins an adapter.
    ///
    /// # Errors
    /// For an adapter that cannot be, weights that cannot be read, or a device without the memory.
    pub fn open(
        files: &ModelFiles,
        adapter: &AdapterConfig,
        options: NetworkOptions,
    ) -> anyhow::Result<Self> {
        adapter.check()?;
        ensure!(
            options.form == Form::Plain || options.device.is_cpu(),
            "the fast form of operations is the CPU's alone"
        );
        let config = files.config.clone();
        let (vocabulary, hidden) = (config.vocabulary, config.hidden);
        let device = &options.device;
        let embedding = files.weights.tensor("model.embed_tokens.weight", &[vocabulary, hidden])?;
        let head = match config.tied_embeddings {
            true => embedding.to_device(device)?,
            false => files.weights.tensor("lm_head.weight", &[vocabulary, hidden])?.to_device(device)?,
        };
        let norm = files.weights.tensor("model.norm.weight", &[hidden])?.to_device(device)?;
        let projections = adapter.projections(&config)?;
        let (layout, parameters) = adapter.begin(&config, options.seed)?;
        let each = layout.len() / (config.layers * projections.len());
        let layers = (0..config.layers).map(|layer| Layer::open(files, layer, &projections, each, device));
        let mut network = Self {
            layers: layers.collect::<anyhow::Result<_>>()?,
            frequencies: config.rope.frequencies(config.head_dim),
            fingerprint: files.fingerprint,
            embeddings: match &options.objective_embeddings {
                Some(embeddings) => embeddings.clone(),
                None => objective_embeddings(files, adapter, &embedding)?,
            },
            adapter: adapter.clone(),
            config,
            options,
            embedding,
            head,
            norm,
            layout,
            parameters: Vec::new(),
            variables: Vec::new(),
        };
        network.set_parameters(&parameters)?;
        Ok(network)
    }

    fn pass<'a>(
        &'a self,
        packed: &'a Packed,
        samples: &'a [Sample<'a>],
        training: bool,
    ) -> anyhow::Result<Pass<'a>> {
        let sizes = (self.config.heads, self.config.kv_heads, self.config.head_dim);
        let shared = Attention::new(packed, sizes, &self.frequencies, &self.options.device);
        let width = self.adapter.conditioning_width(&self.config);
        Ok(Pass {
            rows: Rows::new(
                &self.adapter,
                (packed, samples),
                (&self.embeddings, width),
                training,
                &self.options.device,
            )?,
            attention: Arc::new(shared),
            predictions: &packed.predictions,
        })
    }

    /// Embeddings of the pass's tokens, (rows, hidden).
    fn embed(&self, packed: &Packed) -> anyhow::Result<Tensor> {
        let tokens = Tensor::new(packed.tokens.as_slice(), &Device::Cpu)?;
        Ok(self.embedding.index_select(&tokens, 0)?.to_device(&self.options.device)?)
    }

    /// One layer, (rows, hidden) → (rows, hidden).
    fn layer(&self, index: usize, x: &Tensor, pass: &Pass<'_>) -> anyhow::Result<Tensor> {
        let (layer, form) = (&self.layers[index], self.options.form);
        let epsilon = self.config.rms_norm_epsilon;
        let normed = rms_norm(x, &layer.norm, epsilon, form)?;
        let dropped = pass.rows.drop(&normed, index, 0)?;
        let linear = |name| self.linear(layer, name, &normed, &dropped, pass);
        let (q, k, v) =
            (linear("self_attn.q_proj")?, linear("self_attn.k_proj")?, linear("self_attn.v_proj")?);
        let mixed = attention(&pass.attention, &q, &k, &v, form)?;
        let dropped = pass.rows.drop(&mixed, index, 1)?;
        let x = (x + self.linear(layer, "self_attn.o_proj", &mixed, &dropped, pass)?)?;
        if !layer.linears.iter().any(|linear| linear.name.starts_with("mlp")) {
            return Ok(mlp(&x, &layer.mlp, form)?);
        }
        let normed = rms_norm(&x, &layer.mlp.norm, epsilon, form)?;
        let dropped = pass.rows.drop(&normed, index, 2)?;
        let gate = self.linear(layer, "mlp.gate_proj", &normed, &dropped, pass)?.silu()?;
        let product = (gate * self.linear(layer, "mlp.up_proj", &normed, &dropped, pass)?)?;
        let dropped = pass.rows.drop(&product, index, 3)?;
        Ok((x + self.linear(layer, "mlp.down_proj", &product, &dropped, pass)?)?)
    }

    /// W x + b, and what the adapter adds, which sees `dropped`.
    fn linear(
        &self,
        layer: &Layer,
        name: &str,
        x: &Tensor,
        dropped: &Tensor,
        pass: &Pass<'_>,
    ) -> anyhow::Result<Tensor> {
        let linear =
            layer.linears.iter().find(|linear| linear.name == name).context("a layer of this name")?;
        let mut y = frozen_linear(x, &linear.weight)?;
        if let Some(bias) = &linear.bias {
            y = y.broadcast_add(bias)?;
        }
        let Some(first) = linear.adapter else { return Ok(y) };
        let variables = &self.variables[first..];
        Ok((y + Modulated { adapter: &self.adapter, variables }.delta(dropped, &pass.rows)?)?)
    }

    /// Log-probabilities of all predictions from the last layer's output.
    fn read(&self, x: &Tensor, pass: &Pass<'_>) -> anyhow::Result<Tensor> {
        let rows: Vec<u32> = pass.predictions.iter().map(|(row, _)| *row).collect();
        let targets: Vec<u32> = pass.predictions.iter().map(|(_, target)| *target).collect();
        let x = x.index_select(&Tensor::new(rows, &self.options.device)?, 0)?;
        let x = rms_norm(&x, &self.norm, self.config.rms_norm_epsilon, self.options.form)?;
        Ok(log_probabilities(&x, &self.head, &targets, self.options.form)?)
    }

    /// Adds a store's gradients of our variables to the flat vector.
    fn collect(
        &self,
        store: &GradStore,
        gradient: &mut [f32],
        range: std::ops::Range<usize>,
    ) -> anyhow::Result<()> {
        for (parameter, variable) in self.layout[range.clone()].iter().zip(&self.variables[range]) {
            // candle drops gradients silently: a missing one is an error of ours.
            let found = store.get(variable).with_context(|| format!("{} has no gradient", parameter.name))?;
            let values = found.flatten_all()?.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
            for (sum, value) in gradient[parameter.range()].iter_mut().zip(values) {
                *sum += value;
            }
        }
        Ok(())
    }

    /// The whole graph at once.
    fn gradient_of_graph(
        &self,
        pass: &Pass<'_>,
        x: Tensor,
        seed: impl FnOnce(&[f32]) -> Vec<f32>,
        gradient: &mut [f32],
    ) -> anyhow::Result<()> {
        let mut x = x;
        for layer in 0..self.layers.len() {
            x = self.layer(layer, &x, pass)?;
        }
        let read = self.read(&x, pass)?;
        let slopes = Tensor::new(seed(&read.to_vec1()?), &self.options.device)?;
        let store = (read * slopes)?.sum_all()?.backward()?;
        self.collect(&store, gradient, 0..self.layout.len())
    }

    /// Layer by layer from the last, each computed again from its input.
    fn gradient_of_layers(
        &self,
        pass: &Pass<'_>,
        x: Tensor,
        seed: impl FnOnce(&[f32]) -> Vec<f32>,
        gradient: &mut [f32],
    ) -> anyhow::Result<()> {
        let mut inputs = vec![x];
        for layer in 0..self.layers.len() {
            let x = self.layer(layer, &inputs[layer], pass)?.detach();
            inputs.push(x);
        }
        let last = Var::from_tensor(&inputs.pop().context("the last layer's output")?)?;
        let read = self.read(&last, pass)?;
        let slopes = Tensor::new(seed(&read.to_vec1()?), &self.options.device)?;
        let store = (read * slopes)?.sum_all()?.backward()?;
        let mut slopes = store.get(&last).context("the last layer's output has no gradient")?.clone();
        let each = self.layout.len() / self.layers.len();
        for (layer, input) in inputs.into_iter().enumerate().rev() {
            let input = Var::from_tensor(&input)?;
            let store = (self.layer(layer, &input, pass)? * slopes)?.sum_all()?.backward()?;
            self.collect(&store, gradient, layer * each..(layer + 1) * each)?;
            slopes = store.get(&input).context("a layer's input has no gradient")?.clone();
        }
        Ok(())
    }
}

impl Network for LlamaNetwork {
    fn layout(&self) -> &[Parameter] {
        &self.layout
    }

    fn parameter_count(&self) -> usize {
        self.parameters.len()
    }

    fn parameters(&self) -> Vec<f32> {
        self.parameters.clone()
    }

    fn set_parameters(&mut self, parameters: &[f32]) -> anyhow::Result<()> {
        let count = self.layout.last().map_or(0, |last| last.range().end);
        ensure!(parameters.len() == count, "{} numbers for {count} parameters", parameters.len());
        let variable = |parameter: &Parameter| {
            let values = &parameters[parameter.range()];
            Var::from_slice(values, parameter.shape.as_slice(), &self.options.device)
        };
        self.variables = self.layout.iter().map(variable).collect::<Result<_, _>>()?;
        self.parameters = parameters.to_vec();
        Ok(())
    }

    fn log_probabilities(&mut self, samples: &[Sample<'_>]) -> anyhow::Result<Vec<[f64; 2]>> {
        let packed = Packed::of(samples);
        let pass = self.pass(&packed, samples, false)?;
        let mut x = self.embed(&packed)?;
        for layer in 0..self.layers.len() {
            x = self.layer(layer, &x, &pass)?.detach();
        }
        Ok(sums(samples, &self.read(&x, &pass)?.to_vec1()?))
    }

    fn add_gradient(
        &mut self,
        samples: &[Sample<'_>],
        loss: &Loss,
        gradient: &mut [f32],
    ) -> anyhow::Result<Vec<LossValue>> {
        ensure!(gradient.len() == self.parameters.len(), "a gradient of {} numbers", gradient.len());
        let packed = Packed::of(samples);
        let pass = self.pass(&packed, samples, true)?;
        let mut losses = Vec::new();
        let seed = |read: &[f32]| {
            let sides = sums(samples, read);
            let of = |(sample, sums): (&Sample<'_>, &[f64; 2])| {
                loss.of(sample.preference, &sample.pair.labels, sample.pair.likelihoods(*sums))
            };
            losses = samples.iter().zip(&sides).map(of).collect();
            slopes(samples, &losses)
        };
        let x = self.embed(&packed)?;
        match self.options.checkpoint_activations {
            false => self.gradient_of_graph(&pass, x, seed, gradient)?,
            true => self.gradient_of_layers(&pass, x, seed, gradient)?,
        }
        if let Some(bad) = losses.iter().position(|loss| !loss.total.is_finite()) {
            bail!("the loss of pair {bad} of the batch is {}", losses[bad].total);
        }
        Ok(losses)
    }

    fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let backbone = (&self.config, &self.fingerprint);
        self.adapter.save(folder, backbone, &self.layout, &self.parameters, &self.embeddings)
    }
}

// === impl Layer ===

impl Layer {
    /// `each`: tensors of one adapted projection.
    fn open(
        files: &ModelFiles,
        index: usize,
        adapted: &[Projection],
        each: usize,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let ModelFiles { config, weights, .. } = files;
        let name = |suffix: &str| format!("model.layers.{index}.{suffix}");
        let norm = |suffix| anyhow::Ok(weights.tensor(&name(suffix), &[config.hidden])?.to_device(device)?);
        let mut linears = Vec::new();
        let mut feed_forward = Vec::new();
        let any_inside = adapted.iter().any(|projection| projection.name.starts_with("mlp"));
        for projection in super::adapter::projections(config) {
            let Projection { name: module, outputs, inputs } = projection;
            let weight =
                weights.tensor(&name(&format!("{module}.weight")), &[outputs, inputs])?.to_device(device)?;
            let bias = match config.qkv_bias
                && ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].contains(&module)
            {
                true => {
                    Some(weights.tensor(&name(&format!("{module}.bias")), &[outputs])?.to_device(device)?)
                }
                false => None,
            };
            let inside = module.starts_with("mlp");
            if inside {
                feed_forward.push(weight.clone());
            }
            if !inside || any_inside {
                let place = adapted.iter().position(|projection| projection.name == module);
                let adapter = place.map(|place| (index * adapted.len() + place) * each);
                linears.push(Linear { name: module, weight, bias, adapter });
            }
        }
        let feed_forward: [Tensor; 3] =
            feed_forward.try_into().map_err(|_| anyhow::anyhow!("a feed-forward block has three weights"))?;
        let mlp = Mlp::new(norm("post_attention_layernorm.weight")?, config.rms_norm_epsilon, feed_forward);
        Ok(Self { norm: norm("input_layernorm.weight")?, linears, mlp })
    }
}

/// Log-probabilities of whole answers, from those of their tokens.
fn sums(samples: &[Sample<'_>], read: &[f32]) -> Vec<[f64; 2]> {
    let mut read = read.iter();
    let mut sum = |answer: &Vec<u32>| read.by_ref().take(answer.len()).map(|value| f64::from(*value)).sum();
    samples.iter().map(|sample| [sum(&sample.pair.answers[0]), sum(&sample.pair.answers[1])]).collect()
}

/// dL/d log π of every predicted token: that of the answer's sum.
fn slopes(samples: &[Sample<'_>], losses: &[LossValue]) -> Vec<f32> {
    let of = |(sample, loss): (&Sample<'_>, &LossValue)| {
        let [a, b] = [0, 1].map(|side: usize| sample.pair.answers[side].len());
        let slopes = loss.slopes.map(|slope| slope as f32);
        std::iter::repeat_n(slopes[0], a).chain(std::iter::repeat_n(slopes[1], b)).collect::<Vec<_>>()
    };
    samples.iter().zip(losses).flat_map(of).collect()
}

/// o_i: the L2-normalised mean of the token embeddings of each objective's description [paper; mean and norm ours].
fn objective_embeddings(
    files: &ModelFiles,
    adapter: &AdapterConfig,
    embedding: &Tensor,
) -> anyhow::Result<Vec<f32>> {
    if adapter.method != Method::Moslora || adapter.conditioning != Conditioning::Text {
        return Ok(Vec::new());
    }
    let tokenizer = files
        .tokenizer
        .as_ref()
        .context("text conditioning embeds descriptions; the model has no tokenizer")?;
    let mut rows = Vec::new();
    for objective in &adapter.objectives {
        let tokens = tokenizer.encode(&objective.description, false)?;
        ensure!(!tokens.is_empty(), "the description of {:?} has no tokens", objective.name);
        let mean = embedding.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?.mean(0)?;
        let norm = mean.sqr()?.sum_all()?.sqrt()?;
        rows.extend(mean.broadcast_div(&norm)?.to_vec1::<f32>()?);
    }
    Ok(rows)
}
