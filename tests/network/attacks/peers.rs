//! A peer with a valid certificate that lies: about names, places, notices and lists.

use common::maps::FilterMode;
use common::signal::{
    AgentRequest, AgentResponse, ArrivalNotice, Listener, MigrationAbort, MigrationProgress,
    PeerMessage, Phase, Reason, Reception, ReceptionMode,
};
use support::agent::{Agent, domain, uuid};
use support::liar::Liar;
use support::netns::{Namespace, privileged, wait_for};

/// MAC of the victim's NIC.
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
const VICTIM: u8 = 1;
/// Policy that permits every migration by every kind of requester.
const ALL: &str = "[[policy.depart]]\ndomains = [\"*\"]\ndestinations = [\"*\"]\n\
    by = [\"operator\", \"vm\", \"hook\"]\n\
    [[policy.arrive]]\nsources = [\"*\"]\ndomains = [\"*\"]\n";
/// The same policy without `by`, which permits only operators.
const OPERATOR: &str = "[[policy.depart]]\ndomains = [\"*\"]\ndestinations = [\"*\"]\n\
    [[policy.arrive]]\nsources = [\"*\"]\ndomains = [\"*\"]\n";

/// Runs an attack on an agent with the domain `victim`.
fn with_agent(rules: &str, attack: impl FnOnce(&Agent) + Send) {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    host.run_with_bpffs(|bpffs| {
        let victim = domain("victim", VICTIM, "tap0", MAC);
        attack(&Agent::start(bpffs, &[victim], rules));
    });
}

fn request(number: u8, name: &str) -> AgentRequest {
    AgentRequest {
        domain_uuid: uuid(number).into(),
        domain_name: name.to_owned(),
        macs: vec![],
        listeners: vec![],
        vm_transaction: None,
    }
}

fn told(phase: Phase) -> MigrationProgress {
    MigrationProgress {
        phase,
        processed_bytes: 1,
        total_bytes: 1,
        elapsed_ms: 1,
        vm_pause_ms: None,
        clock_ns: None,
    }
}

#[test]
fn peer_brings_no_domain_under_a_name_or_uuid_that_libvirt_knows_otherwise() {
    with_agent(ALL, |agent| {
        let mut liar = agent.peer("vms2");
        liar.say(1, request(VICTIM, "tv-1"));
        assert!(liar.refusal(1).contains("is victim on vms1, not \"tv-1\""));
        liar.say(2, request(9, "victim"));
        assert!(liar.refusal(2).contains("another domain \"victim\""));
        assert_eq!(agent.query("migrations"), Some(serde_json::json!([])));
    });
}

/// Requests the arrival of a domain. Returns true if the agent accepts the request at once.
fn is_taken(liar: &mut Liar, number: u8) -> bool {
    let transaction = u64::from(number);
    liar.say(transaction, request(number, &format!("tv-{number}")));
    match liar.answer(transaction) {
        PeerMessage::AgentResponse(_) => true,
        PeerMessage::MigrationProgress(told) if told.phase == Phase::Preparing => false,
        other => panic!("{other:?}"),
    }
}

#[test]
fn peer_takes_its_share_of_the_places_and_no_more_whatever_it_says() {
    with_agent(ALL, |agent| {
        let mut liar = agent.peer("vms2");
        let places = (10..30)
            .filter(|number| is_taken(&mut liar, *number))
            .count();
        assert_eq!(places, 8);
        // None of these domains arrives.
        for number in 10..30 {
            liar.say(number, told(Phase::Completed));
        }
        assert!(!is_taken(&mut liar, 30));
        let mut other = agent.peer("vms3");
        assert!(is_taken(&mut other, 40));
        for number in 31..60 {
            liar.say(u64::from(number), request(number, &format!("tv-{number}")));
        }
        let reason = liar.refusal(59);
        assert!(
            reason.contains("8 domains from this peer already"),
            "{reason}"
        );
        // The waiting request now gets its turn.
        let reason = "cancelled".to_owned();
        liar.say(10, MigrationAbort(Reason::unspecified(reason)));
        wait_for("its turn", || is_taken(&mut liar, 18).then_some(()));
    });
}

#[test]
fn peer_that_asks_on_and_on_is_refused() {
    with_agent(ALL, |agent| {
        let mut liar = agent.peer("vms2");
        for transaction in 1..=200 {
            liar.say(transaction, request(10, "tv-10"));
        }
        // Some requests are permitted again over time, so the test looks for any refusal.
        let is_refused = |answer: &PeerMessage| {
            let PeerMessage::MigrationAbort(abort) = answer else {
                return false;
            };
            abort.0.text.contains("too many requests of vms2")
        };
        let refused = (1..=200).any(|transaction| is_refused(&liar.answer(transaction)));
        assert!(refused, "200 requests were taken");
    });
}

fn notice(number: u8, name: &str) -> ArrivalNotice {
    ArrivalNotice {
        domain_uuid: uuid(number).into(),
        domain_name: name.to_owned(),
    }
}

#[test]
fn peer_learns_what_a_domain_listens_to_only_where_the_policy_has_libvirt_move_it_there() {
    with_agent(OPERATOR, |agent| {
        let mut liar = agent.peer("vms2");
        liar.say(1, notice(VICTIM, "victim"));
        let reason = liar.refusal(1);
        assert!(reason.contains("by \"hook\""), "{reason}");
    });
    with_agent(ALL, |agent| {
        let mut liar = agent.peer("vms2");
        liar.say(1, notice(VICTIM, "tv-1"));
        assert!(liar.refusal(1).contains("no domain \"tv-1\""));
        liar.say(2, notice(VICTIM, "victim"));
        assert!(matches!(liar.answer(2), PeerMessage::AgentRequest(_)));
    });
}

#[test]
fn notice_of_a_peer_keeps_no_operator_from_moving_the_domain() {
    with_agent(ALL, |agent| {
        let mut liar = agent.peer("vms2");
        liar.say(1, notice(VICTIM, "victim"));
        assert!(matches!(liar.answer(1), PeerMessage::AgentRequest(_)));
        let mut operator = agent
            .command(&["migrate", "victim", "vms2"])
            .spawn()
            .unwrap();
        let reason = liar.refusal(1);
        assert!(reason.contains("An operator is moving"), "{reason}");
        let (transaction, message) = liar.hear();
        assert!(matches!(message, PeerMessage::AgentRequest(_)));
        let reason = "enough".to_owned();
        liar.say(transaction, MigrationAbort(Reason::unspecified(reason)));
        assert!(!operator.wait().unwrap().success());
    });
}

/// Returns an unsolicited response with as many receptions as fit into a frame.
fn bloated() -> AgentResponse {
    let reception = Reception {
        vlan: 0,
        multicast_address: [0xff; 16].into(),
        mode: ReceptionMode::Native,
        waited_ms: 0,
    };
    AgentResponse {
        prefix: [0; 16].into(),
        prefix_length: 64,
        agent_address: [1; 16].into(),
        receptions: vec![reception; 130_000],
        copy_tls: true,
    }
}

/// Returns a request whose lists exceed those of any real domain.
fn boundless() -> AgentRequest {
    let listener = Listener {
        vlan: 0,
        multicast_address: [0xff; 16].into(),
        filter_mode: FilterMode::Include as u8,
        sources: vec![[1; 16].into(); 100_000],
        mld_version: 2,
        mac: MAC.into(),
        flows: vec![],
    };
    AgentRequest {
        listeners: vec![listener],
        ..request(10, "tv-10")
    }
}

#[test]
fn lists_without_end_cost_no_memory_and_are_not_taken_in() {
    const FRAMES: u64 = 100;
    with_agent(ALL, |agent| {
        let mut liar = agent.peer("vms2");
        assert!(is_taken(&mut liar, 11));
        let before = agent.peak_memory();
        let frames = [
            PeerMessage::from(bloated()).encode(1),
            PeerMessage::from(boundless()).encode(2),
        ];
        for number in 0..FRAMES {
            liar.say_bytes(&frames[usize::from(number % 2 == 1)]);
        }
        wait_for("all frames to be refused", || {
            (agent.counter("frames_malformed") == FRAMES).then_some(())
        });
        let grown = agent.peak_memory() - before;
        eprintln!("{grown} KiB");
        assert!(grown < 16 * 1024, "{grown} KiB");
    });
}

#[test]
fn names_and_reasons_that_a_peer_says_forge_no_lines() {
    with_agent(ALL, |agent| {
        let mut liar = agent.peer("vms2");
        let said = "tv\nWARN forged\u{1b}[2J";
        liar.say(2, request(9, said));
        let answer = format!("{:?}", liar.answer(2));
        assert!(answer.contains("cannot be shown"), "{answer}");
        liar.say(3, request(9, "tv-9"));
        liar.answer(3);
        let reason = said.to_owned();
        liar.say(3, MigrationAbort(Reason::unspecified(reason)));
        let answer = format!("{:?}", liar.answer(3));
        assert!(answer.contains("cannot be shown"), "{answer}");
        let output = agent.command(&["migrations"]).output().unwrap();
        let table = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(table.contains("tv-9"), "{table}");
        for shown in [table, agent.log()] {
            assert!(!shown.contains("\u{1b}[2J"), "{shown:?}");
            assert!(!shown.contains("forged"), "{shown:?}");
        }
    });
}
