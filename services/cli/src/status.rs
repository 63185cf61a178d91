//! `uniarm status`: who is in a cluster, as its routers see it.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use serde_json::json;
use tokio::time::{sleep, timeout};
use tonic::Request;
use uniarm_proto::{Member, Role, adapter::versioned, pb, pb::status_client::StatusClient};

use crate::{args::StatusArgs, client::EndpointArgs};

/// A router that does not answer within this is shown as away.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

const WATCH_EVERY: Duration = Duration::from_secs(1);

/// How full a pool is.
#[derive(Debug, Clone, Copy, Default)]
pub struct PoolLoad {
    pub under_way: u32,
    pub capacity: u32,
}

/// The routers' views put together.
#[derive(Default)]
struct Overview {
    /// By role, then id.
    members: BTreeMap<(&'static str, String), Seen>,
    /// Requests of members that have left the store.
    leaving: BTreeMap<String, u32>,
    /// Routers that do not answer, and why.
    away: Vec<(String, String)>,
}

/// One reward model, over all workers.
#[derive(Debug, Default, PartialEq)]
struct Steering {
    /// Workers that give it to new requests.
    workers: usize,
    /// Workers that keep it for streams that began with it.
    retiring: usize,
    /// What other workers say of it.
    faults: Vec<(String, String)>,
}

struct Seen {
    member: Member,
    /// Requests of all routers that were asked.
    under_way: u32,
    is_left_alone: bool,
}

pub async fn run(args: StatusArgs) -> anyhow::Result<()> {
    loop {
        let overview = Overview::gather(&args.endpoint).await?;
        if overview.away.len() == args.endpoint.endpoint.len() {
            let (endpoint, reason) = &overview.away[0];
            bail!(
                "no router answers: {endpoint}: {reason}; start one with `uniarm up`, or name it with --endpoint"
            );
        }
        // In a file or a pipe, one table follows the other.
        if args.watch && !args.json && std::io::stdout().is_terminal() {
            print!("\x1b[2J\x1b[H"); // an empty screen
        }
        match args.json {
            true => println!("{}", overview.as_json()),
            false => overview.print(),
        }
        if !args.watch {
            return Ok(());
        }
        sleep(WATCH_EVERY).await;
    }
}

/// Of all base workers, and of all reward workers.
///
/// # Errors
/// When an address is none, or a router reports what is no member.
pub async fn pool_loads(routers: &EndpointArgs) -> anyhow::Result<[PoolLoad; 2]> {
    let overview = Overview::gather(routers).await?;
    Ok([overview.load(Role::Base), overview.load(Role::Reward)])
}

// === impl PoolLoad ===

impl std::fmt::Display for PoolLoad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.under_way, self.capacity)
    }
}

// === impl Overview ===

impl Overview {
    async fn gather(routers: &EndpointArgs) -> anyhow::Result<Self> {
        let mut overview = Self::default();
        let dialer = routers.key.trust.dialer()?;
        for endpoint in &routers.endpoint {
            let channel = dialer
                .channel(endpoint)
                .with_context(|| format!("{endpoint:?} is not an address such as http://127.0.0.1:7000"))?;
            let mut router = StatusClient::new(channel);
            let mut ask = Request::new(pb::ReportRequest {});
            if let Some(key) = &routers.key.api_key {
                key.sign(ask.metadata_mut());
            }
            match timeout(ANSWER_TIMEOUT, router.report(ask)).await {
                Ok(Ok(report)) => overview.add(report.into_inner())?,
                Ok(Err(status)) => overview.away.push((endpoint.clone(), status.message().to_owned())),
                Err(_) => overview.away.push((endpoint.clone(), "no answer in time".into())),
            }
        }
        Ok(overview)
    }

    fn add(&mut self, report: pb::ReportResponse) -> anyhow::Result<()> {
        for seen in report.members {
            let member =
                Member::try_from(seen.member.context("a router reports a member without a record")?)?;
            let key = (member.role.name(), member.id.to_string());
            let known =
                self.members.entry(key).or_insert(Seen { member, under_way: 0, is_left_alone: false });
            known.under_way += seen.under_way;
            known.is_left_alone |= seen.left_alone;
        }
        for gone in report.leaving {
            *self.leaving.entry(gone.id).or_default() += gone.under_way;
        }
        Ok(())
    }

    fn load(&self, role: Role) -> PoolLoad {
        let mut load = PoolLoad::default();
        for seen in self.members.values().filter(|seen| seen.member.role == role) {
            load.under_way += seen.under_way;
            load.capacity += seen.member.capacity;
        }
        load
    }

    /// Reward models by name, each version for itself.
    fn catalogue(&self) -> BTreeMap<String, Steering> {
        let mut catalogue: BTreeMap<String, Steering> = BTreeMap::new();
        for Seen { member, .. } in self.members.values() {
            for model in &member.reward_models {
                let known = catalogue.entry(model.name.clone()).or_default();
                match model.retired {
                    true => known.retiring += 1,
                    false => known.workers += 1,
                }
            }
            for fault in member.adapter_faults.iter().filter(|fault| !fault.other_backbone) {
                let known = catalogue.entry(versioned(&fault.name, fault.version)).or_default();
                known.faults.push((member.id.to_string(), fault.reason.clone()));
            }
        }
        catalogue
    }

    fn print(&self) {
        println!("{:<7} {:<24} {:<22} {:>7} {:>9}  SERVES", "ROLE", "ID", "ADDRESS", "UP", "UNDER WAY");
        for ((role, id), seen) in &self.members {
            let under_way = match seen.member.role {
                Role::Router => "-".to_owned(),
                Role::Base | Role::Reward => seen.under_way.to_string(),
            };
            let note = if seen.is_left_alone { "  (left alone: its connection broke)" } else { "" };
            let (address, up) = (&seen.member.address, words(seen.age()));
            println!(
                "{role:<7} {id:<24} {address:<22} {up:>7} {under_way:>9}  {}{note}",
                seen.serves().join(", ")
            );
        }
        for (id, under_way) in &self.leaving {
            println!(
                "{:<7} {id:<24} {:<22} {:>7} {under_way:>9}  (not in the store: leaving, or lost)",
                "-", "-", "-"
            );
        }
        for (endpoint, reason) in &self.away {
            println!("router at {endpoint} does not answer: {reason}");
        }
        self.print_catalogue();
    }

    fn print_catalogue(&self) {
        let catalogue = self.catalogue();
        if catalogue.is_empty() {
            return;
        }
        println!("\n{:<32} {:>7}", "REWARD MODEL", "WORKERS");
        for (name, known) in &catalogue {
            let retiring = match known.retiring {
                0 => String::new(),
                workers => format!("  (retired on {workers}: for streams that began with it)"),
            };
            println!("{name:<32} {:>7}{retiring}", known.workers);
            for (worker, reason) in &known.faults {
                println!("    not on {worker}: {reason}");
            }
        }
    }

    fn as_json(&self) -> serde_json::Value {
        let member = |((role, id), seen): (&(&str, String), &Seen)| {
            json!({
                "role": role,
                "id": id,
                "generation": seen.member.generation.0,
                "address": seen.member.address,
                "serves": seen.serves(),
                "under_way": seen.under_way,
                "left_alone": seen.is_left_alone,
            })
        };
        let leaving = self.leaving.iter().map(|(id, under_way)| json!({ "id": id, "under_way": under_way }));
        let away =
            self.away.iter().map(|(endpoint, reason)| json!({ "endpoint": endpoint, "reason": reason }));
        let fault = |(worker, reason): &(String, String)| json!({ "worker": worker, "reason": reason });
        let reward_model = |(name, known): (String, Steering)| {
            json!({
                "name": name,
                "workers": known.workers,
                "retiring": known.retiring,
                "faults": known.faults.iter().map(fault).collect::<Vec<_>>(),
            })
        };
        json!({
            "reward_models": self.catalogue().into_iter().map(reward_model).collect::<Vec<_>>(),
            "members": self.members.iter().map(member).collect::<Vec<_>>(),
            "leaving": leaving.collect::<Vec<_>>(),
            "routers_away": away.collect::<Vec<_>>(),
        })
    }
}

// === impl Seen ===

impl Seen {
    fn serves(&self) -> Vec<&str> {
        let base = self.member.base_model.iter().map(|model| model.name.as_str());
        let rewards = self.member.reward_models.iter().filter(|model| !model.retired);
        base.chain(rewards.map(|model| model.name.as_str())).collect()
    }

    /// A generation is the time at which its life began, in milliseconds, unless a clock was set back.
    fn age(&self) -> Duration {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        now.saturating_sub(Duration::from_millis(self.member.generation.0))
    }
}

fn words(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(under_way: u32, left_alone: bool) -> pb::ReportResponse {
        let member = pb::Member { id: "base-0".into(), role: pb::Role::Base as i32, ..pb::Member::default() };
        pb::ReportResponse {
            revision: 1,
            members: vec![pb::MemberReport { member: Some(member), under_way, left_alone }],
            leaving: vec![pb::Leaving { id: "base-1".into(), under_way }],
        }
    }

    #[test]
    fn the_views_of_several_routers_add_up() {
        let mut overview = Overview::default();
        overview.add(report(2, false)).unwrap();
        overview.add(report(3, true)).unwrap();
        let json = overview.as_json();
        assert_eq!(json["members"][0]["under_way"], 5);
        assert_eq!(json["members"][0]["left_alone"], true);
        assert_eq!(json["leaving"], json!([{ "id": "base-1", "under_way": 5 }]));
    }

    #[test]
    fn the_catalogue_counts_workers_by_version_and_says_who_lacks_one() {
        let model = |version, retired| pb::RewardModel {
            name: format!("my@{version}"),
            version,
            retired,
            ..pb::RewardModel::default()
        };
        let reward = |id: &str, reward_models, adapter_faults| pb::MemberReport {
            member: Some(pb::Member {
                id: id.into(),
                role: pb::Role::Reward as i32,
                reward_models,
                adapter_faults,
                ..pb::Member::default()
            }),
            ..pb::MemberReport::default()
        };
        let fault = pb::AdapterFault {
            name: "my".into(),
            version: 2,
            reason: "no such folder".into(),
            other_backbone: false,
        };
        let members = vec![
            reward("reward-0", vec![model(1, true), model(2, false)], vec![]),
            reward("reward-1", vec![model(1, false)], vec![fault]),
        ];
        let mut overview = Overview::default();
        overview.add(pb::ReportResponse { members, ..pb::ReportResponse::default() }).unwrap();
        let json = overview.as_json();
        let fault = json!([{ "worker": "reward-1", "reason": "no such folder" }]);
        assert_eq!(
            json["reward_models"],
            json!([
                { "name": "my@1", "workers": 1, "retiring": 1, "faults": [] },
                { "name": "my@2", "workers": 1, "retiring": 0, "faults": fault },
            ])
        );
        assert_eq!(json["members"][0]["serves"], json!(["my@2"]));
    }

    #[test]
    fn ages_are_said_in_one_unit() {
        let said = [59, 119, 120, 7200, 200_000].map(|seconds| words(Duration::from_secs(seconds)));
        assert_eq!(said, ["59 s", "119 s", "2 min", "2 h", "2 d"]);
    }
}
