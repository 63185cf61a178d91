//! What reward workers make of a catalogue, as their records say it. Pure.

use std::sync::Arc;

use serde_json::{Value, json};
use uniarm_cluster::{Adapters, Snapshot};
use uniarm_proto::{AdapterFault, AdapterRecord, AdapterVersion, Member, Role, adapter::versioned};

/// What each reward worker says of one version.
#[derive(Debug, Default, PartialEq)]
pub struct Verdicts {
    /// Workers that serve it, by their ids.
    pub serving: Vec<String>,
    /// Workers that do not, and why.
    pub faults: Vec<(String, AdapterFault)>,
    /// Workers that have said nothing of it.
    pub silent: Vec<String>,
}

/// One line of a list.
#[derive(Debug, PartialEq)]
pub struct Row {
    pub name: String,
    pub version: u64,
    pub state: &'static str,
    /// `None`: the store has lost it.
    pub known: Option<AdapterVersion>,
    pub verdicts: Verdicts,
}

// === impl Verdicts ===

impl Verdicts {
    pub fn of(members: &Snapshot, name: &str, version: u64) -> Self {
        let (mut verdicts, model) = (Self::default(), versioned(name, version));
        for member in workers(members) {
            let id = member.id.to_string();
            let fault = |fault: &&AdapterFault| fault.name == name && fault.version == version;
            if member.reward_models.iter().any(|served| served.name == model) {
                verdicts.serving.push(id);
            } else if let Some(fault) = member.adapter_faults.iter().find(fault) {
                verdicts.faults.push((id, fault.clone()));
            } else {
                verdicts.silent.push(id);
            }
        }
        verdicts
    }

    /// Nobody else has anything to say.
    pub fn are_all_in(&self) -> bool {
        self.silent.is_empty() && !(self.serving.is_empty() && self.faults.is_empty())
    }

    pub fn as_json(&self) -> Value {
        let fault = |(worker, fault): &(String, AdapterFault)| json!({ "worker": worker, "reason": fault.reason, "other_backbone": fault.other_backbone });
        json!({
            "served_by": self.serving,
            "refused_by": self.faults.iter().map(fault).collect::<Vec<_>>(),
            "no_word_of": self.silent,
        })
    }
}

/// Reward workers that take sessions; ranks that wait for their group are none.
pub fn workers(members: &Snapshot) -> impl Iterator<Item = &Arc<Member>> {
    members.with_role(Role::Reward).filter(|member| !member.reward_models.is_empty())
}

/// By name, the newest version first: what is for new requests, what was removed last, and what is still served.
pub fn rows(adapters: &Adapters, members: &Snapshot) -> Vec<Row> {
    let mut rows: Vec<Row> =
        adapters.records().iter().flat_map(|record| of_record(record, members)).collect();
    for served in workers(members).flat_map(|member| &member.reward_models).filter(|model| model.version > 0)
    {
        let (name, version) = (served.bare_name(), served.version);
        if !rows.iter().any(|row| row.name == name && row.version == version) {
            let verdicts = Verdicts::of(members, name, version);
            let name = name.to_owned();
            rows.push(Row { name, version, state: "not in the store", known: None, verdicts });
        }
    }
    rows
}

fn of_record(record: &AdapterRecord, members: &Snapshot) -> Vec<Row> {
    let newest = record.newest().version;
    let row = |known: &AdapterVersion| Row {
        name: record.name.clone(),
        version: known.version,
        state: match (known.retired_at_ms, known.version == newest) {
            (None, _) => "current",
            (Some(_), true) => "removed",
            (Some(_), false) => "superseded",
        },
        known: Some(known.clone()),
        verdicts: Verdicts::of(members, &record.name, known.version),
    };
    let is_of_interest = |row: &Row| row.version == newest || !row.verdicts.serving.is_empty();
    record.versions.iter().rev().map(row).filter(is_of_interest).collect()
}

#[cfg(test)]
mod tests {
    use uniarm_proto::{MemberId, RewardModel};

    use super::*;

    fn worker(id: &str, versions: &[u64], faults: &[AdapterFault]) -> Arc<Member> {
        let model = |version: &u64| RewardModel {
            name: versioned("my", *version),
            version: *version,
            ..RewardModel::default()
        };
        let plain = RewardModel { name: "reward".into(), ..RewardModel::default() };
        let reward_models = versions.iter().map(model).chain([plain]).collect();
        let adapter_faults = faults.to_vec();
        let member = Member::new(Role::Reward);
        Arc::new(Member { id: MemberId(id.into()), reward_models, adapter_faults, ..member })
    }

    fn record(versions: &[(u64, Option<u64>)]) -> Arc<AdapterRecord> {
        let version = |(version, retired_at_ms): &(u64, Option<u64>)| AdapterVersion {
            version: *version,
            source: "/a".into(),
            digest: [1; 32],
            backbone: None,
            put_at_ms: 1,
            retired_at_ms: *retired_at_ms,
        };
        let versions = versions.iter().map(version).collect();
        Arc::new(AdapterRecord { name: "my".into(), versions })
    }

    #[test]
    fn each_worker_has_its_say_once() {
        let fault = AdapterFault::new("my", 2, "no such folder", false);
        let waiting = Arc::new(Member { id: MemberId("g.1".into()), ..Member::new(Role::Reward) });
        let all = [worker("r1", &[1, 2], &[]), worker("r2", &[1], std::slice::from_ref(&fault)), waiting];
        let members = Snapshot::new(all.clone(), 1);
        let verdicts = Verdicts::of(&members, "my", 2);
        assert_eq!(
            (&verdicts.serving[..], &verdicts.faults[..]),
            (&["r1".to_owned()][..], &[("r2".to_owned(), fault)][..])
        );
        assert!(verdicts.are_all_in());
        let more = Snapshot::new(all.into_iter().chain([worker("r3", &[], &[])]), 2);
        assert_eq!(Verdicts::of(&more, "my", 2).silent, ["r3"]);
        assert!(!Verdicts::of(&Snapshot::default(), "my", 2).are_all_in(), "somebody may come");
    }

    #[test]
    fn old_versions_are_listed_while_somebody_serves_them() {
        let states = |versions, served: &[u64]| -> Vec<(u64, &str)> {
            let adapters = Adapters::new([record(versions)], 1);
            let members = Snapshot::new([worker("r1", served, &[])], 1);
            rows(&adapters, &members).iter().map(|row| (row.version, row.state)).collect()
        };
        let three = &[(1, Some(5)), (2, Some(6)), (3, None)];
        assert_eq!(states(three, &[2, 3]), [(3, "current"), (2, "superseded")]);
        assert_eq!(states(&[(4, Some(5))], &[]), [(4, "removed")]);
        assert_eq!(states(three, &[9]), [(3, "current"), (9, "not in the store")]);
    }
}
