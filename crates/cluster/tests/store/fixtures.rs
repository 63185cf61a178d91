//! What the tests of every store share: a member, and waiting for what others see of it.

use std::sync::Arc;
use std::time::Duration;

use uniarm_cluster::{
    Adapters, AdaptersReceiver, NewAdapter, Registration, RegistrationState, Snapshot, SnapshotReceiver,
};
use uniarm_proto::{
    AdapterFault, Generation, Member, MemberId, Objective, RewardModel, Role, TokenizerFingerprint,
};

/// Far above what any step takes, so that only a promise that is broken runs into it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A base worker with every field in use.
pub fn member(id: &str, generation: u64) -> Member {
    Member {
        id: MemberId(id.to_owned()),
        generation: Generation(generation),
        role: Role::Base,
        address: "127.0.0.1:7001".to_owned(),
        tokenizer: Some(TokenizerFingerprint { core: [1; 32], core_tokens: 49_152, full: [2; 32] }),
        vocabulary: 49_152,
        capacity: 64,
        base_model: None,
        reward_models: vec![RewardModel {
            name: "assistant@2".to_owned(),
            objectives: vec![Objective {
                name: "harmless".to_owned(),
                description: "Do no harm — in any language.".to_owned(),
            }],
            backbone: "smollm2".to_owned(),
            method: "moslora".to_owned(),
            single_objective: false,
            version: 2,
            retired: true,
        }],
        group: String::new(),
        rank: 0,
        size: 1,
        adapter_faults: vec![AdapterFault::new("terse", 3, "no such folder", false)],
    }
}

/// What somebody puts: a folder and files of its own for each digest.
pub fn adapter(name: &str, digest: u8) -> NewAdapter {
    NewAdapter {
        name: name.to_owned(),
        source: format!("/adapters/{digest}"),
        digest: [digest; 32],
        backbone: Some([9; 32]),
    }
}

pub async fn wait_for_adapters(
    seen: &mut AdaptersReceiver,
    wanted: impl Fn(&Adapters) -> bool,
) -> Arc<Adapters> {
    let waiting = seen.wait_for(|adapters| wanted(adapters));
    let result = tokio::time::timeout(PATIENCE, waiting).await.map(|held| held.unwrap().clone());
    result.unwrap_or_else(|_| panic!("not seen in time: {:?}", seen.borrow()))
}

pub async fn wait_for(seen: &mut SnapshotReceiver, wanted: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
    let waiting = seen.wait_for(|snapshot| wanted(snapshot));
    let result = tokio::time::timeout(PATIENCE, waiting).await.map(|held| held.unwrap().clone());
    result.unwrap_or_else(|_| panic!("not seen in time: {:?}", seen.borrow()))
}

pub async fn wait_for_state(registration: &Registration, wanted: RegistrationState) {
    let mut state = registration.watch();
    let waiting = tokio::time::timeout(PATIENCE, state.wait_for(|state| *state == wanted)).await;
    assert!(waiting.is_ok(), "still {:?}, not {wanted:?}", registration.state());
}
