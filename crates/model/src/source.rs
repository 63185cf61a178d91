//! From the name of a model, a path or `hf://org/name`, to its files, read and checked.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::{Config, token_ids};
use crate::error::ModelError;
use crate::gguf::Gguf;
use crate::hub;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Files of a Hugging Face folder.
pub(crate) const CONFIG: &str = "config.json";
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(crate) const TEMPLATE_JINJA: &str = "chat_template.jinja";
pub(crate) const TEMPLATE_JSON: &str = "chat_template.json";
pub(crate) const WEIGHTS: &str = "model.safetensors";
pub(crate) const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// A JSON file beside the weights is small; a larger one is not what it claims to be.
const JSON_BYTES_MAX: u64 = 64 << 20;
/// Tokens that end a turn. Some GGUF files name only the end of text, and would chat with themselves.
const END_OF_TURN: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"];

/// Where and how models are fetched.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Cache of downloads; absent: `HF_HUB_CACHE`, `HF_HOME/hub` or `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// Only what is cached; nothing is asked of the network.
    pub offline: bool,
    /// Show a progress bar on standard error.
    pub progress: bool,
}

/// A model as read from its files, before anything runs.
pub struct ModelFiles {
    /// `org/name` for `hf://`, else the name of the file (without `.gguf`) or folder.
    pub name: String,
    pub config: Config,
    pub weights: Weights,
    /// Absent for a folder without `tokenizer.json`.
    pub tokenizer: Option<Tokenizer>,
    pub template: Option<ChatTemplate>,
    /// Identity of weights and configuration: SHA-256 over tensor names, shapes and sampled bytes.
    pub fingerprint: [u8; 32],
}

/// Opens `/path/model.gguf`, `/path/folder` (Hugging Face files, or one GGUF) or
/// `hf://org/name[@revision][/file.gguf]`.
///
/// # Errors
/// [`ModelError::NotFound`], [`ModelError::Download`]; [`ModelError::Malformed`] and its neighbours for files
/// that cannot be what they claim to be, each naming the file.
pub fn open(source: &str, options: &OpenOptions) -> Result<ModelFiles, ModelError> {
    if let Some(address) = source.strip_prefix("hf://") {
        let (name, path) = hub::fetch(address, options)?;
        return open_path(&path, name);
    }
    let path = Path::new(source);
    let name = match path.extension() {
        Some(extension) if extension == "gguf" => path.file_stem(),
        _ => path.file_name(),
    };
    let name = name.map_or_else(|| source.to_owned(), |name| name.to_string_lossy().into_owned());
    open_path(path, name)
}

fn open_path(path: &Path, name: String) -> Result<ModelFiles, ModelError> {
    if path.join(CONFIG).is_file() {
        return open_folder(path, name);
    }
    if path.is_file() {
        return open_gguf(path, name);
    }
    let not_found =
        |reason: &str| ModelError::NotFound { model: path.display().to_string(), reason: reason.to_owned() };
    if !path.is_dir() {
        return Err(not_found("no such file or folder"));
    }
    let entries = std::fs::read_dir(path).map_err(|error| ModelError::io(path, error))?;
    let mut ggufs = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"));
    match (ggufs.next(), ggufs.next()) {
        (Some(gguf), None) => open_gguf(&gguf, name),
        (Some(_), Some(_)) => Err(not_found("several GGUF files: name one")),
        (None, _) => Err(not_found("neither config.json nor a GGUF file")),
    }
}

fn open_gguf(path: &Path, name: String) -> Result<ModelFiles, ModelError> {
    let gguf = Gguf::open(path)?;
    let mut config = Config::from_gguf(&gguf)?;
    add_end_of_turn(&mut config, &gguf);
    let mut tokenizer = Tokenizer::from_gguf(&gguf)?;
    tokenizer.set_ends(config.bos, &config.eos);
    let template = match gguf.text("tokenizer.chat_template") {
        Some(source) => {
            let written = |id: Option<u32>| id.map(|id| tokenizer.token_text(id)).unwrap_or_default();
            let eos = gguf.token_id("tokenizer.ggml.eos_token_id");
            let (bos, eos) = (written(config.bos), written(eos));
            Some(ChatTemplate::new(path, source, bos, eos)?)
        }
        None => None,
    };
    let weights = Weights::from_gguf(gguf, &config);
    finish(name, config, weights, Some(tokenizer), template)
}

fn open_folder(folder: &Path, name: String) -> Result<ModelFiles, ModelError> {
    let config_file = folder.join(CONFIG);
    let mut config = Config::from_json(&read_json(&config_file)?, &config_file)?;
    let generation = read_json_if_there(&folder.join(GENERATION_CONFIG))?;
    let settings = read_json_if_there(&folder.join(TOKENIZER_CONFIG))?;
    let bos_token = written_token(&settings["bos_token"]);
    let eos_token = written_token(&settings["eos_token"]);
    config.eos.extend(token_ids(&generation["eos_token_id"]));
    config = config.check(&config_file)?;

    let tokenizer_file = folder.join(TOKENIZER);
    let tokenizer = if tokenizer_file.is_file() {
        let mut tokenizer = Tokenizer::from_json(&tokenizer_file)?;
        if let Some(eos) = tokenizer.token_id(&eos_token) {
            config.eos.push(eos);
            config = config.check(&config_file)?;
        }
        let bos = tokenizer.token_id(&bos_token).or(config.bos);
        tokenizer.set_ends(bos, &config.eos);
        Some(tokenizer)
    } else {
        None
    };
    let template = match template_source(folder, &settings)? {
        Some((file, source)) => Some(ChatTemplate::new(&file, &source, bos_token, eos_token)?),
        None => None,
    };
    let weights = Weights::from_safetensors(folder, &weight_files(folder)?)?;
    finish(name, config, weights, tokenizer, template)
}

fn finish(
    name: String,
    config: Config,
    weights: Weights,
    mut tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
) -> Result<ModelFiles, ModelError> {
    weights.check(&config)?;
    if let Some(tokenizer) = &mut tokenizer {
        let (tokens, rows) = (tokenizer.fingerprint().core_tokens, config.vocabulary);
        if tokens as usize > rows {
            let reason = format!("the tokenizer has {tokens} tokens, the embedding {rows} rows");
            return Err(ModelError::malformed(weights.path(), reason));
        }
        tokenizer.set_rows(rows);
    }
    let fingerprint = weights.fingerprint(&config)?;
    Ok(ModelFiles { name, config, weights, tokenizer, template, fingerprint })
}

fn add_end_of_turn(config: &mut Config, gguf: &Gguf) {
    let tokens = gguf.texts("tokenizer.ggml.tokens").unwrap_or_default();
    let ids = (0_u32..).zip(tokens).filter(|(_, text)| END_OF_TURN.contains(&text.as_str()));
    config.eos.extend(ids.map(|(id, _)| id));
    config.eos.sort_unstable();
    config.eos.dedup();
}

/// The safetensors files of a folder: one, or the shards that the index names.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index_file = folder.join(WEIGHTS_INDEX);
    if !index_file.is_file() {
        let single = folder.join(WEIGHTS);
        return if single.is_file() {
            Ok(vec![single])
        } else {
            Err(ModelError::NotFound {
                model: folder.display().to_string(),
                reason: format!("neither {WEIGHTS} nor {WEIGHTS_INDEX}"),
            })
        };
    }
    let names = shard_names(&read_json(&index_file)?, &index_file)?;
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// File names in the `weight_map` of an index, each once, ascending.
pub(crate) fn shard_names(index: &Value, file: &Path) -> Result<Vec<String>, ModelError> {
    let map = index["weight_map"]
        .as_object()
        .ok_or_else(|| ModelError::malformed(file, "'weight_map' is missing or not an object"))?;
    let mut names: Vec<String> = map.values().filter_map(Value::as_str).map(str::to_owned).collect();
    names.sort_unstable();
    names.dedup();
    // An index must not lead out of its folder.
    match names.iter().find(|name| Path::new(name).components().count() != 1 || name.starts_with('.')) {
        Some(name) => Err(ModelError::malformed(file, format!("shard '{name}' is not a plain file name"))),
        None if names.is_empty() => Err(ModelError::malformed(file, "'weight_map' is empty")),
        None => Ok(names),
    }
}

/// The chat template and the file it stands in. A folder has it in one of three places, the newest first.
fn template_source(folder: &Path, settings: &Value) -> Result<Option<(PathBuf, String)>, ModelError> {
    let jinja = folder.join(TEMPLATE_JINJA);
    if jinja.is_file() {
        let source = std::fs::read_to_string(&jinja).map_err(|error| ModelError::io(&jinja, error))?;
        return Ok(Some((jinja, source)));
    }
    let json = folder.join(TEMPLATE_JSON);
    for (file, template) in [
        (json.clone(), read_json_if_there(&json)?["chat_template"].take()),
        (folder.join(TOKENIZER_CONFIG), settings["chat_template"].clone()),
    ] {
        let source = match template {
            Value::String(source) => Some(source),
            // Several by name; the others are for tools and retrieval.
            Value::Array(named) => named
                .iter()
                .find(|template| template["name"] == "default")
                .and_then(|template| template["template"].as_str())
                .map(str::to_owned),
            _ => None,
        };
        if let Some(source) = source {
            return Ok(Some((file, source)));
        }
    }
    Ok(None)
}

/// A token of `tokenizer_config.json`: a string, or an object with its content.
fn written_token(value: &Value) -> String {
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
}

fn read_json_if_there(file: &Path) -> Result<Value, ModelError> {
    if file.is_file() { read_json(file) } else { Ok(Value::Null) }
}

pub(crate) fn read_json(file: &Path) -> Result<Value, ModelError> {
    let metadata = std::fs::metadata(file).map_err(|error| ModelError::io(file, error))?;
    if metadata.len() > JSON_BYTES_MAX {
        return Err(ModelError::malformed(file, format!("{} bytes of JSON", metadata.len())));
    }
    let bytes = std::fs::read(file).map_err(|error| ModelError::io(file, error))?;
    serde_json::from_slice(&bytes).map_err(|error| ModelError::malformed(file, format!("not JSON: {error}")))
}

/// Engines move models between threads, and many threads encode at once.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<ModelFiles>();
};
