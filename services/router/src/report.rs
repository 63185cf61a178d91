//! The cluster as this router sees it: whole for whoever has it for himself; to a tenant what its rights let it use, and nothing
//! of the machines behind.

use std::sync::Arc;

use tokio::time::Instant;
use tonic::{Request, Response, Status};
use uniarm_proto::{
    Member,
    pb::{
        self,
        status_server::{Status as Report, StatusServer},
    },
};

use crate::{
    place::{Loads as _, Scope},
    relay::Relay,
    server::{RouterService, authorization},
    tenants::Caller,
};

impl RouterService {
    pub fn status_server(&self) -> StatusServer<Self> {
        StatusServer::new(self.clone())
    }

    /// The cluster as this router sees it, as far as `caller` may.
    pub(crate) fn overview(&self, caller: &Caller) -> pb::ReportResponse {
        report(&self.relay, caller)
    }
}

#[tonic::async_trait]
impl Report for RouterService {
    async fn report(
        &self,
        request: Request<pb::ReportRequest>,
    ) -> Result<Response<pb::ReportResponse>, Status> {
        let caller = self.identify(authorization(request.metadata()))?;
        Ok(Response::new(self.overview(&caller)))
    }
}

fn report(relay: &Relay, caller: &Caller) -> pb::ReportResponse {
    let snapshot = Arc::clone(&relay.members.borrow());
    let sick = relay.circuits.lock().sick(Instant::now(), &snapshot);
    let of = |member: &Arc<Member>| {
        let shown = match caller.is_tenant() {
            true => shown_to_tenant(member, caller.scope())?,
            false => Member::clone(member),
        };
        Some(pb::MemberReport {
            under_way: relay.loads.under_way(&member.id) as u32,
            left_alone: sick.contains(&member.id),
            member: Some(shown.into()),
        })
    };
    let gone = |(id, under_way)| pb::Leaving { id: format!("{id}"), under_way: under_way as u32 };
    // What they served is not known any more, and so not who may see them.
    let may_see_leaving = caller.scope() == Scope::everything();
    let busy = relay.loads.busy().into_iter();
    let busy = busy.filter(|(id, _)| may_see_leaving && snapshot.get(id).is_none());
    let mut leaving: Vec<_> = busy.map(gone).collect();
    leaving.sort_by(|a, b| a.id.cmp(&b.id));
    pb::ReportResponse {
        revision: snapshot.revision(),
        members: snapshot.members().iter().filter_map(of).collect(),
        leaving,
    }
}

/// What a tenant sees of a member: what it may use there. `None`: that is nothing of all that is served there. Addresses, and
/// reasons why adapters were refused (they hold paths), are for whoever runs the cluster.
fn shown_to_tenant(member: &Member, scope: &Scope) -> Option<Member> {
    let serves = |member: &Member| member.base_model.is_some() || !member.reward_models.is_empty();
    let mut shown = Member { address: String::new(), adapter_faults: Vec::new(), ..member.clone() };
    shown.base_model.take_if(|model| !scope.has_base(model));
    shown.reward_models.retain(|reward| scope.has_reward(reward));
    (serves(&shown) || !serves(member)).then_some(shown)
}

#[cfg(test)]
mod tests {
    use uniarm_proto::{AdapterFault, BaseModel, MemberId, RewardModel, Role};

    use super::*;

    fn only(base: &str, reward: &str) -> Scope {
        let set = |name: &str| Some([name.to_owned()].into());
        Scope::only(set(base), set(reward))
    }

    #[test]
    fn a_tenant_sees_what_it_may_use_and_nothing_of_the_machines() {
        let base = BaseModel { name: "m".into(), context_tokens: 1, vocabulary: 1, has_chat_template: true };
        let reward = |name: &str| RewardModel { name: name.into(), version: 1, ..RewardModel::default() };
        let of = |role, id: &str| Member {
            id: MemberId(id.into()),
            address: "10.0.0.1:7000".into(),
            ..Member::new(role)
        };
        let base = Member { base_model: Some(base), ..of(Role::Base, "b") };
        let reward = Member {
            reward_models: vec![reward("mine@1"), reward("theirs@1")],
            adapter_faults: vec![AdapterFault::new("mine", 2, "/srv/secret: no such folder", false)],
            ..of(Role::Reward, "r")
        };
        let scope = only("m", "mine");
        let shown = shown_to_tenant(&reward, &scope).unwrap();
        let names: Vec<_> = shown.reward_models.iter().map(|model| model.name.as_str()).collect();
        assert_eq!((names, shown.address.as_str(), shown.adapter_faults), (vec!["mine@1"], "", vec![]));
        assert!(shown_to_tenant(&base, &scope).unwrap().base_model.is_some());
        let other = only("n", "other");
        assert_eq!(shown_to_tenant(&base, &other), None);
        assert_eq!(shown_to_tenant(&reward, &other), None);
        assert!(shown_to_tenant(&of(Role::Router, "x"), &other).is_some(), "everybody asks routers");
        assert_eq!(shown_to_tenant(&reward, Scope::everything()).unwrap().reward_models.len(), 2);
    }
}
