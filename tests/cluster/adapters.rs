//! The catalogue of adapters in a running cluster: a new version without a restart, streams that end on the version that
//! they began with, whatever is lost meanwhile, and adapters that cannot be served.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use uniarm_cluster::testing::EtcdServer;
use uniarm_proto::{ClusterClient, Code, Event, GenerateRequest, GuidanceTerm, Transcript};

use crate::{
    harness::{Running, knows_its_workers, machine, ranks, repository, request, worker},
    shards::start_all,
};

/// What a router needs to see a record that a worker has written, on a busy machine.
const SEEN_WITHIN: Duration = Duration::from_secs(10);

/// Long enough for a put, a lost reward worker and a lost router.
const LONG_TOKENS: u32 = 192;
const SHORT_TOKENS: u32 = 24;

/// A record of a process that was killed stays for so long.
const LEASE: [&str; 2] = ["--lease-ttl", "2"];

struct World {
    etcd: EtcdServer,
    base: Running,
    rewards: Vec<Running>,
    routers: Vec<Running>,
    folders: tempfile::TempDir,
}

// === impl World ===

impl World {
    async fn start() -> Option<Self> {
        let etcd = EtcdServer::start()?;
        let address = etcd.address();
        let store = [&["--store", &address][..], &LEASE].concat();
        let reward = [&store[..], &["--threads", "1", "--prompted", "taken=Be brief."]].concat();
        let (base, rewards) = thread::scope(|scope| {
            let base = scope.spawn(|| worker("base", &[&store[..], &["--threads", "1"]].concat()));
            let rewards = [0, 1].map(|_| scope.spawn(|| worker("reward", &reward)));
            (base.join().unwrap(), rewards.map(|reward| reward.join().unwrap()).into())
        });
        let routers: Vec<_> = (0..2).map(|_| Running::start("router", &store)).collect();
        for router in &routers {
            knows_its_workers(&router.address).await;
        }
        Some(Self { etcd, base, rewards, routers, folders: tempfile::tempdir().unwrap() })
    }

    fn client(&self) -> ClusterClient {
        let addresses: Vec<_> = self.routers.iter().map(|router| router.address.clone()).collect();
        ClusterClient::new(&addresses).unwrap().with_patience(SEEN_WITHIN)
    }

    /// The adapter that ships, under a scale of its own: other files, and below 0 the opposite of its answers.
    fn folder(&self, name: &str, alpha: &str) -> PathBuf {
        let shipped = repository().join("adapters/positive-concise");
        let folder = self.folders.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let tensors = "adapter_model.safetensors";
        std::fs::copy(shipped.join(tensors), folder.join(tensors)).unwrap();
        let config = std::fs::read_to_string(shipped.join("adapter_config.json")).unwrap();
        let altered = config.replace("\"lora_alpha\": 16.0", &format!("\"lora_alpha\": {alpha}"));
        std::fs::write(folder.join("adapter_config.json"), altered).unwrap();
        folder
    }

    fn adapters(&self, arguments: &[&str]) -> Output {
        let store = self.etcd.address();
        let mut command = Command::new(env!("CARGO_BIN_EXE_uniarm"));
        command.arg("adapters").args(arguments).args(["--store", &store]);
        tokio::task::block_in_place(|| command.output().unwrap())
    }

    /// What a put says that succeeds.
    fn put(&self, name: &str, folder: &Path) -> Value {
        let output = self.adapters(&["put", name, &folder.display().to_string(), "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The line of a version in a list.
    fn listed(&self, name: &str, version: u64) -> Value {
        let output = self.adapters(&["list", "--json"]);
        let list: Value = serde_json::from_slice(&output.stdout).unwrap();
        let is_it = |row: &&Value| row["name"] == name && row["version"] == version;
        list["adapters"].as_array().unwrap().iter().find(is_it).cloned().unwrap_or_default()
    }

    /// Waits until two workers serve these versions: the record of one that was killed may still be there.
    async fn both_serve(&self, name: &str, versions: &[u64]) {
        let began = Instant::now();
        for version in versions {
            loop {
                let row = self.listed(name, *version);
                if row["served_by"].as_array().map(Vec::len) == Some(2) {
                    break;
                }
                assert!(began.elapsed() < SEEN_WITHIN, "two workers do not serve it: {row}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Waits until each router gives new requests this version of the name, or none.
    async fn routers_see(&self, name: &str, version: Option<u64>) {
        for router in &self.routers {
            let client = ClusterClient::new(&[&router.address]).unwrap();
            let began = Instant::now();
            loop {
                let served = client.list_models().await.unwrap().reward_models;
                if served.iter().find(|model| model.name == name).map(|model| model.version) == version {
                    break;
                }
                assert!(
                    began.elapsed() < SEEN_WITHIN,
                    "a router does not see {name} {version:?}: {served:?}"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

fn steered(reward: &str, tokens: u32) -> GenerateRequest {
    let preference = vec![("positive".to_owned(), 0.5), ("concise".to_owned(), 0.5)];
    let mut steered = request("Tell me about the sea.", &[]);
    steered.guidance = vec![GuidanceTerm { reward: reward.to_owned(), preference, strength: 1.0 }];
    steered.sampling.temperature = 1.0;
    steered.sampling.max_tokens = tokens;
    steered.sampling.ignore_eos = true;
    steered
}

fn version_of(transcript: &Transcript) -> &str {
    &transcript.started.as_ref().unwrap().guidance[0].reward
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_on_the_version_that_it_began_with_whatever_is_put_or_lost() {
    let _machine = machine();
    let Some(mut world) = World::start().await else { return };
    let client = world.client();
    let put = world.put("my", &world.folder("one", "16.0"));
    assert_eq!((put["version"].as_u64(), put["served_by"].as_array().unwrap().len()), (Some(1), 2), "{put}");
    world.routers_see("my", Some(1)).await;
    let undisturbed = client.complete(steered("my", LONG_TOKENS), None).await.unwrap();
    assert_eq!(version_of(&undisturbed), "my@1");

    let mut answers = client.generate(steered("my", LONG_TOKENS), None);
    let (mut transcript, mut tokens, mut lost_router) = (Transcript::default(), 0, false);
    while let Some(event) = answers.next().await {
        let event = event.unwrap();
        transcript.apply(&event).unwrap();
        tokens += usize::from(matches!(event, Event::Tokens(_)));
        if tokens == 4 && world.routers.len() == 2 && !lost_router {
            lost_router = true;
            let put = world.put("my", &world.folder("two", "-16.0"));
            assert_eq!((put["version"].as_u64(), put["refused_by"].as_array().unwrap().len()), (Some(2), 0));
            let busy = world.rewards.iter_mut().find(|reward| reward.metric("uniarm_reward_sessions") > 0.0);
            busy.expect("the stream is under way").kill();
            let busy =
                world.routers.iter().position(|one| one.metric("uniarm_router_requests_under_way") > 0.0);
            // It goes on at the other one.
            drop(world.routers.remove(busy.expect("the stream is under way")));
        }
    }
    assert_eq!(transcript.choices, undisturbed.choices);
    assert_eq!(version_of(&transcript), "my@1");
    assert!(world.base.metric("uniarm_base_reward_losses_total") >= 1.0, "no session was lost");
    assert!(world.base.metric("uniarm_base_resumed_answers_total") >= 1.0, "no router was lost");

    world.routers_see("my", Some(2)).await;
    let new = world.client().complete(steered("my", SHORT_TOKENS), None).await.unwrap();
    assert_eq!(version_of(&new), "my@2");
    let old = world.client().complete(steered("my@1", SHORT_TOKENS), None).await.unwrap();
    assert_eq!(old.choices[0].tokens, undisturbed.choices[0].tokens[..SHORT_TOKENS as usize]);
    assert_ne!(old.choices[0].tokens, new.choices[0].tokens, "two versions, one answer");

    // A worker that starts later has both versions; a removal takes the newest from new requests, and from nobody else.
    let lost = world.rewards.iter_mut().position(|reward| !reward.is_alive()).unwrap();
    let lost = &mut world.rewards[lost];
    tokio::task::block_in_place(|| lost.restart());
    world.both_serve("my", &[1, 2]).await;
    let removed = world.adapters(&["remove", "my"]);
    assert!(removed.status.success(), "{removed:?}");
    world.routers_see("my", None).await;
    let refused = world.client().complete(steered("my", SHORT_TOKENS), None).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound.to_tonic(), "{refused}");
    let ended = world.client().complete(steered("my@2", SHORT_TOKENS), None).await.unwrap();
    assert_eq!(ended.choices, new.choices);
    assert_eq!(world.listed("my", 2)["state"], "removed");
}

/// Ranks that follow know nothing of the store's list: they get adapters from rank 0.
#[tokio::test(flavor = "multi_thread")]
async fn a_reward_worker_of_several_processes_serves_what_is_put_as_one_does() {
    let _machine = machine();
    let Some(mut world) = World::start().await else { return };
    let client = world.client();
    world.put("my", &world.folder("one", "16.0"));
    world.routers_see("my", Some(1)).await;
    let by_one = client.complete(steered("my", SHORT_TOKENS), None).await.unwrap();

    let address = world.etcd.address();
    let flags = [&["--store", &address][..], &LEASE].concat();
    let mut group = tokio::task::block_in_place(|| start_all("reward", &ranks(2, &flags)));
    world.rewards.clear();
    world.rewards.push(group.remove(0));
    let by_group = client.complete(steered("my", SHORT_TOKENS), None).await.unwrap();
    assert_eq!(by_group.choices, by_one.choices);

    let began = Instant::now();
    while world.listed("my", 1)["served_by"].as_array().map(Vec::len) != Some(1) {
        assert!(began.elapsed() < SEEN_WITHIN, "the former workers stay in the list");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let put = world.put("my", &world.folder("two", "-16.0"));
    assert_eq!(put["served_by"].as_array().map(Vec::len), Some(1), "{put}");
    world.routers_see("my", Some(2)).await;
    let answer = async |reward: &str| client.complete(steered(reward, SHORT_TOKENS), None).await.unwrap();
    let (old, new) = (answer("my@1").await, answer("my").await);
    assert_eq!(old.choices, by_one.choices);
    assert_ne!(new.choices, by_one.choices, "two versions, one answer");
    assert!(world.rewards[0].is_alive() && group[0].is_alive());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_cannot_be_served_costs_no_other_and_its_reason_is_said() {
    let _machine = machine();
    let Some(mut world) = World::start().await else { return };
    let (good, changing) = (world.folder("good", "16.0"), world.folder("changing", "16.0"));
    world.put("good", &good);
    world.put("changing", &changing);
    world.routers_see("changing", Some(1)).await;

    let refused = |name: &str, folder: &Path, reason: &str| {
        let output = world.adapters(&["put", name, &folder.display().to_string(), "--wait", "20"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(reason), "{said}");
        assert!(
            said.contains("uniarm adapters remove") || reason.contains("wants"),
            "what to do next: {said}"
        );
    };
    // A rank that its tensors do not have, in a version of a name that works.
    let misshapen = world.folder("misshapen", "16.0");
    let config = std::fs::read_to_string(misshapen.join("adapter_config.json")).unwrap();
    std::fs::write(misshapen.join("adapter_config.json"), config.replace("\"r\": 8", "\"r\": 4")).unwrap();
    refused("good", &misshapen, "has shape");
    refused("taken", &good, "command line names a reward model \"taken\"");
    refused("good@1", &good, "wants 1..=128 letters");
    let elsewhere = std::fs::read_to_string(good.join("adapter_config.json")).unwrap();
    let foreign = world.folder("foreign", "16.0");
    let other = elsewhere.replace("4e5ca82d", "00000000");
    std::fs::write(foreign.join("adapter_config.json"), other).unwrap();
    refused("foreign", &foreign, "it was trained over backbone 00000000");
    let client = world.client();
    let answer = client.complete(steered("good", SHORT_TOKENS), None).await.unwrap();
    assert_eq!(version_of(&answer), "good@1", "the version that works goes on");

    // Files that were changed after the put: who has them in memory serves on, who comes later refuses them.
    std::fs::write(changing.join("adapter_config.json"), elsewhere + " ").unwrap();
    world.rewards[0].terminate();
    tokio::task::block_in_place(|| world.rewards[0].restart());
    let row = world.listed("changing", 1);
    assert_eq!(row["served_by"].as_array().map(Vec::len), Some(1), "{row}");
    let reason = row["refused_by"][0]["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("they have changed"), "{row}");
    let row = world.listed("good", 1);
    assert_eq!(row["served_by"].as_array().map(Vec::len), Some(2), "the older one works there too: {row}");
    assert!(world.rewards.iter_mut().all(Running::is_alive));
    assert!(world.rewards[0].metric("uniarm_reward_adapters_refused") >= 2.0);
    let answer = client.complete(steered("changing", SHORT_TOKENS), None).await.unwrap();
    assert_eq!(version_of(&answer), "changing@1");
}
