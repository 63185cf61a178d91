//! Downloads from the Hugging Face hub, into the cache that Hugging Face's own tools use.
//!
//! A repository is `models--org--name/` with `blobs/<etag>`, `snapshots/<commit>/<file>` (links to blobs) and
//! `refs/<revision>` (a commit). A download goes to `blobs/<etag>.part`, is resumed there after an
//! interruption of the line or of the process, checked, and only then renamed: what has its name is whole.

mod client;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use self::client::{Client, Failure, RETRY_DELAY};
use crate::error::ModelError;
use crate::source::{
    CONFIG, GENERATION_CONFIG, OpenOptions, TEMPLATE_JINJA, TEMPLATE_JSON, TOKENIZER, TOKENIZER_CONFIG,
    WEIGHTS, WEIGHTS_INDEX, read_json, shard_names, weight_files,
};

const ENDPOINT: &str = "https://huggingface.co";
/// Small files that are fetched where a repository has them.
const COMPANIONS: [&str; 5] = [GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE_JINJA, TEMPLATE_JSON];

/// What stands behind `hf://`.
#[derive(Debug, PartialEq, Eq)]
struct Address {
    /// `org/name`
    repository: String,
    /// A branch, a tag or a commit.
    revision: String,
    /// One GGUF among several.
    file: Option<String>,
}

/// The cache, and the hub that fills it.
struct Hub {
    client: Client,
    cache: PathBuf,
    offline: bool,
}

/// A repository at one commit.
struct Listing {
    commit: String,
    files: Vec<String>,
}

/// Finds or fetches the model at `address` (without `hf://`): its name, and the folder or GGUF to open.
///
/// # Errors
/// [`ModelError::Download`], [`ModelError::NotFound`], [`ModelError::Io`] for a cache that cannot be written.
pub(crate) fn fetch(address: &str, options: &OpenOptions) -> Result<(String, PathBuf), ModelError> {
    let address = Address::parse(address)?;
    let path = Hub::from_environment(options)?.fetch(&address)?;
    Ok((address.name(), path))
}

impl Address {
    fn parse(text: &str) -> Result<Self, ModelError> {
        let malformed = || ModelError::NotFound {
            model: format!("hf://{text}"),
            reason: "the form is hf://org/name[@revision][/file.gguf]".to_owned(),
        };
        let mut parts = text.splitn(3, '/');
        let (Some(organisation), Some(name)) = (parts.next(), parts.next()) else {
            return Err(malformed());
        };
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let file = parts.next().map(str::to_owned);
        let plain = |word: &str| {
            let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !word.is_empty() && !word.starts_with('.') && !word.contains("..") && word.chars().all(letters)
        };
        let file_is_sound =
            file.as_deref().is_none_or(|file| file.ends_with(".gguf") && file.split('/').all(plain));
        if [organisation, name, revision].into_iter().all(plain) && file_is_sound {
            let repository = format!("{organisation}/{name}");
            return Ok(Self { repository, revision: revision.to_owned(), file });
        }
        Err(malformed())
    }

    fn name(&self) -> String {
        match &self.file {
            Some(file) => {
                let file = file.rsplit('/').next().unwrap_or(file);
                file.trim_end_matches(".gguf").to_owned()
            }
            None => self.repository.clone(),
        }
    }

    fn not_found(&self, reason: String) -> Failure {
        ModelError::NotFound { model: format!("hf://{}", self.repository), reason }.into()
    }
}

/// A variable that is set, and not to nothing.
fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Where downloaded models are kept, as Hugging Face's own tools have it. `None`: no variable says where.
pub fn cache_folder() -> Option<PathBuf> {
    set("HF_HUB_CACHE")
        .map(PathBuf::from)
        .or_else(|| set("HF_HOME").map(|home| Path::new(&home).join("hub")))
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| Path::new(&cache).join("huggingface/hub")))
        .or_else(|| set("HOME").map(|home| Path::new(&home).join(".cache/huggingface/hub")))
}

impl Hub {
    fn from_environment(options: &OpenOptions) -> Result<Self, ModelError> {
        let cache = options.cache_dir.clone().or_else(cache_folder);
        let cache = cache.ok_or_else(|| ModelError::Download {
            url: "hf://".to_owned(),
            reason: "no cache folder: set HF_HOME".to_owned(),
        })?;
        let offline = options.offline || set("HF_HUB_OFFLINE").is_some_and(|value| value != "0");
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let client = Client::new(&endpoint, set("HF_TOKEN"), RETRY_DELAY, options.progress);
        Ok(Self { client, cache, offline })
    }

    /// The folder or GGUF of a model. The network is asked unless a commit is named that is cached already,
    /// because a branch moves; where it cannot be reached, the last known commit must do.
    fn fetch(&self, address: &Address) -> Result<PathBuf, ModelError> {
        let cached = self.cached(address);
        if let Some(path) = cached.as_ref().filter(|_| self.offline || is_commit(&address.revision)) {
            return Ok(path.clone());
        }
        if self.offline {
            let folder = self.folder(address);
            let reason = format!("not complete in {}, and offline", folder.display());
            return Err(ModelError::Download { url: format!("hf://{}", address.repository), reason });
        }
        match (self.download(address), cached) {
            (Ok(path), _) => Ok(path),
            (Err(failure), Some(path)) if failure.transient => {
                tracing::warn!(error = %failure.error, path = %path.display(), "hub away: using the cached model");
                Ok(path)
            }
            (Err(failure), _) => Err(failure.error),
        }
    }

    fn folder(&self, address: &Address) -> PathBuf {
        self.cache.join(format!("models--{}", address.repository.replace('/', "--")))
    }

    /// What the cache holds of a model, if that is all of it.
    fn cached(&self, address: &Address) -> Option<PathBuf> {
        let folder = self.folder(address);
        let commit = if is_commit(&address.revision) {
            address.revision.clone()
        } else {
            fs::read_to_string(folder.join("refs").join(&address.revision)).ok()?.trim().to_owned()
        };
        if !is_commit(&commit) {
            return None;
        }
        let snapshot = folder.join("snapshots").join(commit);
        match &address.file {
            Some(file) => Some(snapshot.join(file)).filter(|path| path.is_file()),
            None if snapshot.join(CONFIG).is_file() => {
                let weights = weight_files(&snapshot).ok()?;
                weights.iter().all(|path| path.is_file()).then_some(snapshot)
            }
            None => {
                let holds = |entry: fs::DirEntry| entry.file_name().to_string_lossy().ends_with(".gguf");
                fs::read_dir(&snapshot).ok()?.filter_map(Result::ok).any(holds).then_some(snapshot)
            }
        }
    }

    fn download(&self, address: &Address) -> Result<PathBuf, Failure> {
        let folder = self.folder(address);
        for part in ["blobs", "refs", "snapshots"] {
            create(&folder.join(part))?;
        }
        // Two workers started together on one model: the second waits, and then finds everything there. The
        // kernel's lock dies with its holder.
        let lock_path = folder.join(".uniarm-lock");
        let lock = File::create(&lock_path).map_err(|error| ModelError::io(&lock_path, error))?;
        if lock.try_lock().is_err() {
            tracing::info!(
                repository = address.repository,
                "another process is fetching this model: waiting"
            );
            lock.lock().map_err(|error| ModelError::io(&lock_path, error))?;
        }

        let listing = self.listing(address)?;
        let snapshot = folder.join("snapshots").join(&listing.commit);
        let mut path = snapshot.clone();
        if let Some(gguf) = listing.gguf(address)? {
            path = self.fetch_file(address, &listing, &gguf)?;
        } else {
            self.fetch_file(address, &listing, CONFIG)?;
            for companion in COMPANIONS.into_iter().filter(|name| listing.has(name)) {
                self.fetch_file(address, &listing, companion)?;
            }
            for weights in self.weights(address, &listing)? {
                self.fetch_file(address, &listing, &weights)?;
            }
        }
        let reference = folder.join("refs").join(&address.revision);
        fs::write(&reference, &listing.commit).map_err(|error| ModelError::io(&reference, error))?;
        Ok(path)
    }

    /// Commit and file names behind a revision.
    fn listing(&self, address: &Address) -> Result<Listing, Failure> {
        let path = format!("api/models/{}/revision/{}", address.repository, address.revision);
        let listing = self.client.json(&path)?;
        let malformed = || address.not_found("the hub's answer is no listing of a repository".to_owned());
        let commit = listing["sha"].as_str().filter(|sha| is_commit(sha)).ok_or_else(malformed)?;
        let files = listing["siblings"].as_array().ok_or_else(malformed)?;
        let files = files.iter().filter_map(|file| file["rfilename"].as_str().map(str::to_owned)).collect();
        Ok(Listing { commit: commit.to_owned(), files })
    }

    /// The safetensors files of a repository: one, or what the index (fetched first) names.
    fn weights(&self, address: &Address, listing: &Listing) -> Result<Vec<String>, Failure> {
        if listing.has(WEIGHTS_INDEX) {
            let index = self.fetch_file(address, listing, WEIGHTS_INDEX)?;
            return Ok(shard_names(&read_json(&index)?, &index)?);
        }
        if listing.has(WEIGHTS) {
            return Ok(vec![WEIGHTS.to_owned()]);
        }
        let reason = format!("the repository has neither {WEIGHTS} nor {WEIGHTS_INDEX} nor a GGUF");
        Err(address.not_found(reason))
    }

    /// A file of the snapshot, fetched if it is not there.
    fn fetch_file(&self, address: &Address, listing: &Listing, file: &str) -> Result<PathBuf, Failure> {
        let folder = self.folder(address);
        let path = folder.join("snapshots").join(&listing.commit).join(file);
        if path.is_file() {
            return Ok(path);
        }
        let url = format!("{}/resolve/{}/{file}", address.repository, listing.commit);
        let blob = self.client.describe(&url)?;
        let home = folder.join("blobs").join(&blob.etag);
        if !home.is_file() {
            self.client.download(&blob, &home, file)?;
        }
        create(path.parent().expect("a snapshot is a folder"))?;
        link(&home, &path)?;
        Ok(path)
    }
}

impl Listing {
    fn has(&self, file: &str) -> bool {
        self.files.iter().any(|name| name == file)
    }

    /// The GGUF to fetch, for an address that names one and for a repository that holds nothing else.
    fn gguf(&self, address: &Address) -> Result<Option<String>, Failure> {
        if let Some(file) = &address.file {
            if self.has(file) {
                return Ok(Some(file.clone()));
            }
            return Err(address.not_found(format!("the repository has no file '{file}'")));
        }
        if self.has(CONFIG) && (self.has(WEIGHTS) || self.has(WEIGHTS_INDEX)) {
            return Ok(None);
        }
        let ggufs: Vec<&str> =
            self.files.iter().map(String::as_str).filter(|f| f.ends_with(".gguf")).collect();
        match ggufs[..] {
            [] if self.has(CONFIG) => Ok(None),
            [] => Err(address.not_found(format!("the repository has neither {CONFIG} nor a GGUF"))),
            [only] if !only.contains('/') => Ok(Some(only.to_owned())),
            _ => Err(address.not_found(format!("name one of its GGUF files: {}", ggufs.join(", ")))),
        }
    }
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.chars().all(|c| c.is_ascii_hexdigit())
}

fn create(folder: &Path) -> Result<(), ModelError> {
    fs::create_dir_all(folder).map_err(|error| ModelError::io(folder, error))
}

/// Links a file of a snapshot to its blob, relative, so that the cache can be moved.
fn link(blob: &Path, path: &Path) -> Result<(), ModelError> {
    let name = blob.file_name().expect("a blob has a name");
    // snapshots/<commit>/<file> lies two folders below the repository, a file in a folder deeper.
    let repository = blob.parent().and_then(Path::parent).expect("a blob lies in <repository>/blobs");
    let depth =
        path.strip_prefix(repository).expect("a snapshot lies in the repository").components().count();
    let target = std::iter::repeat_n("..", depth - 1).collect::<PathBuf>().join("blobs").join(name);
    match std::os::unix::fs::symlink(&target, path) {
        Ok(()) => Ok(()),
        // A dangling link: its blob was removed and is back.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_file() => Ok(()),
        Err(error) => Err(ModelError::io(path, error)),
    }
}

#[cfg(test)]
mod tests;
