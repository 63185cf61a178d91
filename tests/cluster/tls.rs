//! A cluster whose processes know each other by certificates, and a front door that clients know: the same tokens,
//! strangers outside, and certificates that change under load.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use tonic::{Code, Status};
use uniarm_proto::{
    ClusterClient, Dice,
    client::{self, Dialer},
    pb,
};
use uniarm_tls::{ClientTls, Identity, RoleName, testing::Authority};

use crate::harness::{
    Cluster, PROMPTED, Running, ask, borrowed, demo_model, free_address, machine, ranks, request,
};

/// A model that loads on a busy machine, and a rank that is refused after it.
const REFUSED_WITHIN: Duration = Duration::from_secs(60);

/// The flags of an identity between processes.
fn mutual(identity: &Identity) -> Vec<String> {
    let path = |path: &std::path::Path| path.display().to_string();
    let Identity { authority, certificate, key } = identity;
    ["--tls-ca", &path(authority), "--tls-cert", &path(certificate), "--tls-key", &path(key)]
        .map(str::to_owned)
        .to_vec()
}

fn start(role: &str, flags: &[&str], identity: &Identity) -> Running {
    let mutual = mutual(identity);
    Running::start(role, &flags.iter().copied().chain(mutual.iter().map(String::as_str)).collect::<Vec<_>>())
}

struct Files {
    _folder: tempfile::TempDir,
    /// Signs the processes of the cluster.
    inside: Authority,
    /// Signs the front door.
    outside: Authority,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = |name: &str| Authority::new(folder.path(), name);
        let (inside, outside) = (authority("inside"), authority("outside"));
        Self { _folder: folder, inside, outside }
    }

    fn of(&self, role: RoleName) -> Identity {
        self.inside.issue(role.dns(), &[role.dns()])
    }

    fn start(&self) -> Cluster {
        let door = self.outside.issue("door", &["127.0.0.1", "localhost"]);
        let model = ["--model", demo_model()];
        let base = start("base", &model, &self.of(RoleName::Base));
        let reward = start("reward", &[&model[..], &PROMPTED].concat(), &self.of(RoleName::Reward));
        let http = free_address();
        let (certificate, key) = (door.certificate.display().to_string(), door.key.display().to_string());
        let flags = [
            ["--base-peer", &base.address],
            ["--reward-peer", &reward.address],
            ["--http-listen", &http],
            ["--front-cert", &certificate],
            ["--front-key", &key],
        ]
        .concat();
        let router = start("router", &flags, &self.of(RoleName::Router));
        Cluster { router, workers: vec![base, reward], http }
    }

    /// A client that trusts the front door.
    fn client(&self, cluster: &Cluster) -> ClusterClient {
        let tls = ClientTls::of_front_doors(Some(self.outside.file.clone()), None).unwrap();
        let url = format!("https://{}", cluster.router.address);
        ClusterClient::over(&Dialer::of_front_doors(tls), Dice::default(), &[url]).unwrap()
    }
}

#[test]
fn certificates_keep_strangers_out_and_change_nothing_for_members() {
    let _machine = machine();
    let files = Files::new();
    let cluster = files.start();
    let plain = Cluster::three_processes(&[], &PROMPTED);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = files.client(&cluster);
        knows_its_workers(&client).await;
        let asked = request("Give me three reasons to get up early.", &[("positive", 0.6), ("concise", 0.4)]);
        let behind_tls = client.complete(asked.clone(), None).await.unwrap();
        let in_the_clear = ask(&mut plain.client().await, asked.clone()).await.unwrap();
        assert_eq!(behind_tls.choices, in_the_clear.choices);
        strangers_stay_outside(&files, &cluster).await;
        client.complete(asked, None).await.unwrap();
    });
    clients_of_all_kinds_come_in(&files, &cluster);
}

async fn knows_its_workers(client: &ClusterClient) {
    loop {
        let served = client.list_models().await.unwrap();
        if !served.base_models.is_empty() && !served.reward_models.is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn strangers_stay_outside(files: &Files, cluster: &Cluster) {
    let elsewhere = tempfile::tempdir().unwrap();
    let theirs = Authority::new(elsewhere.path(), "theirs");
    let ours = |identity: Identity| Identity { authority: files.inside.file.clone(), ..identity };
    let as_roles = |identity: &Identity| {
        Dialer::mutual(
            ClientTls::mutual(identity, &[RoleName::Router, RoleName::Base, RoleName::Reward]).unwrap(),
        )
    };
    let expired = files.inside.issue_expired("expired", &[RoleName::Router.dns()]);
    let strangers = [
        ("without TLS", Dialer::default()),
        ("of another authority", as_roles(&ours(theirs.issue("stranger", &[RoleName::Router.dns()])))),
        ("with an expired certificate", as_roles(&expired)),
        ("without a role", as_roles(&files.inside.issue("nobody", &["127.0.0.1"]))),
    ];
    for worker in &cluster.workers {
        for (who, dialer) in &strangers {
            assert!(
                describe(dialer, &worker.address).await.is_err(),
                "one {who} came in at {}",
                worker.role()
            );
        }
    }
    // A reward worker's certificate opens no base worker, and a base worker's opens a reward worker.
    let (base, reward) = (&cluster.workers[0], &cluster.workers[1]);
    let of = |role| as_roles(&files.of(role));
    assert!(describe(&of(RoleName::Reward), &base.address).await.is_err());
    assert!(describe(&of(RoleName::Base), &base.address).await.is_err());
    describe(&of(RoleName::Router), &base.address).await.unwrap();
    describe(&of(RoleName::Base), &reward.address).await.unwrap();
    assert!(describe(&of(RoleName::Reward), &reward.address).await.is_err());
    // Nor does the front door speak without TLS, or to somebody who does not trust it.
    for dialer in [Dialer::default(), Dialer::of_front_doors(ClientTls::of_front_doors(None, None).unwrap())]
    {
        for scheme in ["http", "https"] {
            let url = format!("{scheme}://{}", cluster.router.address);
            let client = ClusterClient::over(&dialer, Dice::default(), &[url]).unwrap();
            assert_eq!(client.list_models().await.unwrap_err().code(), Code::Unavailable);
        }
    }
}

async fn describe(dialer: &Dialer, address: &str) -> Result<(), Status> {
    let channel = dialer.connect(address).await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut membership = client::membership(channel);
    let described = membership.describe(pb::DescribeRequest {});
    let described = tokio::time::timeout(Duration::from_secs(10), described).await;
    described.map_err(|_| Status::deadline_exceeded("no answer"))?.map(|_| ())
}

fn clients_of_all_kinds_come_in(files: &Files, cluster: &Cluster) {
    let url = format!("https://{}", cluster.router.address);
    let ca = files.outside.file.display().to_string();
    let told = |arguments: &[&str]| {
        let told = Command::new(env!("CARGO_BIN_EXE_uniarm")).args(arguments).output().unwrap();
        (told.status.success(), String::from_utf8_lossy(&told.stdout).into_owned())
    };
    let (trusts, said) = told(&["models", "--endpoint", &url, "--ca", &ca]);
    assert!(trusts && said.contains("concise"), "{said}");
    assert!(told(&["status", "--endpoint", &url, "--ca", &ca, "--json"]).0);
    assert!(!told(&["models", "--endpoint", &url]).0, "whom browsers trust did not sign it");
    let local = format!("https://{}", cluster.http.replace("127.0.0.1", "localhost"));
    let page =
        Command::new("curl").args(["-sS", "--cacert", &ca, &format!("{local}/health")]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&page.stdout), r#"{"status":"ok"}"#);
}

/// Every certificate of the cluster is renewed again and again while new connections come to the front door: no stream
/// fails.
#[test]
fn certificates_are_renewed_under_load() {
    let _machine = machine();
    let files = Files::new();
    let mut cluster = files.start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _inside = runtime.enter();
    let client = files.client(&cluster);
    runtime.block_on(knows_its_workers(&client));
    let asked = |index: usize| {
        let mut asked = request("Write one line about the sea.", &[("positive", 0.5), ("concise", 0.5)]);
        asked.sampling.seed = Some(index as u64);
        asked.sampling.temperature = 1.0;
        asked.sampling.max_tokens = 24;
        asked
    };
    let before = runtime.block_on(client.complete(asked(0), None)).unwrap();
    let is_over = AtomicBool::new(false);
    let answered = thread::scope(|scope| {
        let (is_over, runtime, files, cluster) = (&is_over, &runtime, &files, &cluster);
        let streams: Vec<_> = (0..4)
            .map(|stream| {
                scope.spawn(move || {
                    let mut answered = 0;
                    while !is_over.load(Ordering::Relaxed) || answered == 0 {
                        // A new connection each time: another handshake with the front door.
                        let answer = async {
                            let client = files.client(cluster);
                            client.complete(asked(stream * 1000 + answered), None).await
                        };
                        runtime.block_on(answer).unwrap();
                        answered += 1;
                    }
                    answered
                })
            })
            .collect();
        for _ in 0..6 {
            for role in [RoleName::Router, RoleName::Base, RoleName::Reward] {
                let _ = files.of(role);
            }
            let _ = files.outside.issue("door", &["127.0.0.1", "localhost"]);
            thread::sleep(Duration::from_millis(500));
        }
        is_over.store(true, Ordering::Relaxed);
        streams.into_iter().map(|stream| stream.join().unwrap()).sum::<usize>()
    });
    println!("{answered} streams while certificates changed");
    // A worker that starts now has one of the new ones, and is known.
    cluster.workers[1].kill();
    cluster.workers[1] = {
        let address = cluster.workers[1].address.clone();
        let flags = ["--model", demo_model(), "--listen", &address];
        start("reward", &[&flags[..], &PROMPTED].concat(), &files.of(RoleName::Reward))
    };
    let after = runtime.block_on(client.complete(asked(0), None)).unwrap();
    assert_eq!(before.choices, after.choices);
}

#[test]
fn ranks_that_know_each_other_by_certificates_write_what_one_process_writes() {
    let _machine = machine();
    let files = Files::new();
    let plain = Cluster::three_processes(&[], &PROMPTED);
    let (meeting, model) = (free_address(), ["--model", demo_model()]);
    let identity = files.of(RoleName::Base);
    let mut group = thread::scope(|scope| {
        let ranks = ranks(2, &[&model[..], &["--group-address", &meeting]].concat());
        let start = |flags: Vec<String>| start("base", &borrowed(&flags), &identity);
        let ranks: Vec<_> = ranks.into_iter().map(|flags| scope.spawn(move || start(flags))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    let reward = start("reward", &[&model[..], &PROMPTED].concat(), &files.of(RoleName::Reward));
    let peers = ["--base-peer", &group[0].address, "--reward-peer", &reward.address];
    let router = start("router", &peers, &files.of(RoleName::Router));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client =
            ClusterClient::over(&Dialer::default(), Dice::default(), std::slice::from_ref(&router.address))
                .unwrap();
        knows_its_workers(&client).await;
        for temperature in [0.0, 1.0] {
            let preference = [("positive", 0.6), ("concise", 0.4)];
            let mut asked = request("Give me three reasons to get up early.", &preference);
            asked.sampling.temperature = temperature;
            let sharded = client.complete(asked.clone(), None).await.unwrap();
            let whole = ask(&mut plain.client().await, asked).await.unwrap();
            assert_eq!(sharded.choices, whole.choices);
        }
    });
    // Steps are seen where the leader is, and nothing of what was asked.
    let steps = crate::harness::http_get(&group[0].admin, "/debug/steps");
    assert!(steps.contains("<h2>base</h2><p>0 to ") && !steps.contains("reasons"), "{steps}");
    group.iter_mut().for_each(Running::kill);
}

#[test]
fn a_rank_that_is_none_of_the_groups_is_told_so() {
    let _machine = machine();
    let files = Files::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let theirs = Authority::new(elsewhere.path(), "theirs").issue("stranger", &[RoleName::Base.dns()]);
    let meeting = free_address();
    let rank = |number: usize, identity: Option<&Identity>| {
        let flags = ["--model", demo_model(), "--group-address", &meeting, "--group-timeout", "5"];
        let flags = ranks(2, &flags).swap_remove(number);
        let mut rank = Command::new(env!("CARGO_BIN_EXE_uniarm"));
        rank.arg("base").args(flags).args(identity.map(mutual).unwrap_or_default());
        Said(rank.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap())
    };
    let base = files.of(RoleName::Base);
    let stranger = Identity { authority: files.inside.file.clone(), ..theirs };
    let reward = files.of(RoleName::Reward);
    let mut leader = rank(0, Some(&base));
    let refused = "rank 0 takes this one for none of the group's: received fatal alert:";
    for (who, identity, sentence) in [
        ("without a certificate", None, "rank 0 speaks TLS, and this one does not".to_owned()),
        ("of another authority", Some(&stranger), format!("{refused} UnknownCA")),
        ("of another role", Some(&reward), format!("{refused} BadCertificate")),
    ] {
        let said = rank(1, identity).until(&sentence);
        println!("a rank {who}: {said}");
    }
    let said = leader.until("rank 1 did not come in time; 127.0.0.1 was turned away: ");
    println!("rank 0: {said}");
}

/// A process that is read until it has said something.
struct Said(Child);

impl Said {
    fn until(&mut self, sentence: &str) -> String {
        let began = Instant::now();
        let lines = BufReader::new(self.0.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut all = String::new();
        for line in lines {
            if line.contains(sentence) {
                return line;
            }
            assert!(began.elapsed() < REFUSED_WITHIN, "no {sentence:?} in {all}");
            all += &line;
            all.push('\n');
        }
        panic!("it ended without {sentence:?}: {all}");
    }
}

impl Drop for Said {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
