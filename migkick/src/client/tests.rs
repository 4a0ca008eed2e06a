use super::*;
use common::signal::{AgentSearchReply, MigrationResponse};
use common::signal::{Code, Reason};
use proptest::prelude::*;

const SOURCE: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const DESTINATION: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const SEARCH: u64 = 1;
const MOVE: u64 = 2;

fn client() -> Client {
    let timing = Timing::default();
    Client::new(Duration::ZERO, timing, vec![10, 11], (SEARCH, MOVE))
}

fn reply() -> VmMessage {
    AgentSearchReply {
        agent: "vms1".to_owned(),
        domain: "viewer".to_owned(),
        destinations: vec!["vms2".to_owned()],
    }
    .into()
}

fn response() -> VmMessage {
    MigrationResponse {
        prefix: [0x20; 16].into(),
        prefix_length: 64,
        agent_address: [0x21; 16].into(),
    }
    .into()
}

fn progress(phase: Phase) -> VmMessage {
    MigrationProgress {
        phase,
        processed_bytes: 1,
        total_bytes: 2,
        elapsed_ms: 3,
        vm_pause_ms: (phase == Phase::Completed).then_some(40),
        clock_ns: None,
    }
    .into()
}

fn abort(reason: &str) -> VmMessage {
    let reason = reason.to_owned();
    MigrationAbort(Reason::unspecified(reason)).into()
}

fn sent(client: &mut Client) -> Vec<Transmit> {
    std::iter::from_fn(|| client.poll_transmit()).collect()
}

fn events(client: &mut Client) -> Vec<Event> {
    std::iter::from_fn(|| client.poll_event()).collect()
}

fn found() -> Client {
    let mut client = client();
    client.handle_datagram(Duration::ZERO, 10, SOURCE, &reply().encode(SEARCH));
    sent(&mut client);
    events(&mut client);
    client
}

fn requesting() -> Client {
    let mut client = found();
    client.request(Duration::ZERO, "vms2".to_owned(), None);
    client
}

fn waiting() -> Client {
    let mut client = requesting();
    client.handle_datagram(Duration::ZERO, 10, SOURCE, &response().encode(MOVE));
    client.ready(Duration::ZERO, MigrationReady::default());
    sent(&mut client);
    events(&mut client);
    client
}

/// Advances time until the client is over; returns the time of each datagram.
fn run_out(client: &mut Client) -> Vec<Duration> {
    let mut times = vec![Duration::ZERO; sent(client).len()];
    while let Some(now) = client.poll_timeout() {
        client.handle_timeout(now);
        times.extend(sent(client).iter().map(|_| now));
    }
    times
}

#[test]
fn search_goes_out_on_every_nic_and_backs_off() {
    let mut client = client();
    let first = sent(&mut client);
    let nics: Vec<u32> = first.iter().map(|transmit| transmit.ifindex).collect();
    assert_eq!(nics, [10, 11]);
    assert!(first.iter().all(|transmit| transmit.to == ALL_NODES));
    let times = run_out(&mut client);
    let distinct: Vec<u128> = times.chunks(2).map(|pair| pair[0].as_millis()).collect();
    assert_eq!(distinct[..6], [100, 300, 700, 1500, 2500, 3500]);
    assert!(matches!(
        events(&mut client).as_slice(),
        [Event::Failed(ClientError::NoAgent { .. })]
    ));
}

#[test]
fn likeliest_nic_wins_over_an_earlier_answer() {
    let mut client = client();
    client.handle_datagram(Duration::ZERO, 11, SOURCE, &reply().encode(SEARCH));
    assert!(events(&mut client).is_empty());
    client.handle_datagram(
        Duration::from_millis(5),
        10,
        SOURCE,
        &reply().encode(SEARCH),
    );
    assert!(matches!(events(&mut client).as_slice(), [Event::Found(agent)] if agent.ifindex == 10));
}

#[test]
fn other_nic_is_taken_when_the_likeliest_is_silent() {
    let mut client = client();
    client.handle_datagram(Duration::ZERO, 11, SOURCE, &reply().encode(SEARCH));
    let settled = client.poll_timeout().unwrap();
    assert_eq!(settled, Timing::default().settle);
    client.handle_timeout(settled);
    assert!(matches!(events(&mut client).as_slice(), [Event::Found(agent)] if agent.ifindex == 11));
}

#[test]
fn request_goes_to_the_agent_alone_with_one_transaction() {
    let mut client = requesting();
    client.handle_timeout(client.poll_timeout().unwrap());
    let transmits = sent(&mut client);
    assert_eq!(transmits.len(), 2);
    for transmit in transmits {
        assert_eq!((transmit.to, transmit.ifindex), (SOURCE, 10));
        assert_eq!(VmMessage::decode(&transmit.bytes).unwrap().0, MOVE);
    }
}

#[test]
fn silent_agent_is_named() {
    let mut client = requesting();
    run_out(&mut client);
    let events = events(&mut client);
    let [Event::Failed(error)] = events.as_slice() else {
        panic!("{events:?}");
    };
    assert_eq!(
        error.to_string(),
        "Agent \"vms1\" has not answered for 30 s; see its log"
    );
}

#[test]
fn agent_at_work_is_waited_for() {
    let mut client = requesting();
    let later = Duration::from_secs(29);
    client.handle_datagram(later, 10, SOURCE, &progress(Phase::Preparing).encode(MOVE));
    assert!(matches!(
        events(&mut client).as_slice(),
        [Event::Progress(_)]
    ));
    client.handle_timeout(Duration::from_secs(31));
    assert!(events(&mut client).is_empty());
}

#[test]
fn ready_is_repeated_to_all_agents_until_the_destination_says_completed() {
    let mut client = waiting();
    for _ in 0..5 {
        client.handle_timeout(client.poll_timeout().unwrap());
    }
    let now = Duration::from_secs(1);
    assert!(
        sent(&mut client)
            .iter()
            .all(|transmit| transmit.to == ALL_NODES)
    );
    client.handle_datagram(
        now,
        10,
        DESTINATION,
        &progress(Phase::Completed).encode(MOVE),
    );
    let events = events(&mut client);
    assert!(
        matches!(events.as_slice(), [Event::Completed(p)] if p.vm_pause_ms == Some(40)),
        "{events:?}"
    );
    assert_eq!(client.poll_timeout(), None);
}

fn arrival_without_pause() -> VmMessage {
    let VmMessage::MigrationProgress(mut arrival) = progress(Phase::Completed) else {
        unreachable!()
    };
    arrival.vm_pause_ms = None;
    arrival.into()
}

#[test]
fn arrival_is_asked_for_the_length_of_the_pause() {
    let mut client = waiting();
    let mut now = Duration::from_secs(1);
    client.handle_datagram(now, 10, DESTINATION, &arrival_without_pause().encode(MOVE));
    assert_eq!(events(&mut client), []);
    sent(&mut client);
    now = client.poll_timeout().unwrap();
    client.handle_timeout(now);
    assert_eq!(sent(&mut client).len(), 1);
    let arrival = progress(Phase::Completed).encode(MOVE);
    client.handle_datagram(now, 10, DESTINATION, &arrival);
    assert!(matches!(
        events(&mut client).as_slice(),
        [Event::Completed(progress)] if progress.vm_pause_ms == Some(40)
    ));
}

#[test]
fn arrival_without_the_length_of_the_pause_counts_after_a_second() {
    let mut client = waiting();
    let now = Duration::from_secs(1);
    client.handle_datagram(now, 10, DESTINATION, &arrival_without_pause().encode(MOVE));
    let times = run_out(&mut client);
    assert_eq!(times.last().unwrap().as_millis(), 1_800);
    assert!(matches!(
        events(&mut client).as_slice(),
        [Event::Completed(progress)] if progress.vm_pause_ms.is_none()
    ));
}

#[test]
fn silence_during_the_move_ends_it_after_a_long_time() {
    let mut client = waiting();
    let times = run_out(&mut client);
    assert_eq!(times.last().unwrap().as_millis(), 59_800);
    assert!(matches!(
        events(&mut client).as_slice(),
        [Event::Failed(ClientError::Lost { .. })]
    ));
}

#[test]
fn reason_of_the_agent_is_verbatim() {
    for mut client in [requesting(), waiting()] {
        let bytes = abort("Destination \"vms2\" is down").encode(MOVE);
        client.handle_datagram(Duration::ZERO, 10, SOURCE, &bytes);
        let events = events(&mut client);
        assert!(
            matches!(events.as_slice(), [Event::Failed(error)] if error.to_string() == "Destination \"vms2\" is down"),
            "{events:?}"
        );
    }
}

#[test]
fn answers_of_strangers_and_other_transactions_are_ignored() {
    let mut client = requesting();
    client.handle_datagram(Duration::ZERO, 10, DESTINATION, &abort("no").encode(MOVE));
    client.handle_datagram(Duration::ZERO, 10, DESTINATION, &response().encode(MOVE));
    client.handle_datagram(Duration::ZERO, 10, SOURCE, &response().encode(99));
    client.handle_datagram(Duration::ZERO, 10, SOURCE, &abort("no").encode(SEARCH));
    assert!(events(&mut client).is_empty());
}

#[test]
fn other_protocol_version_is_named() {
    let mut client = client();
    let bytes = [0x84, 0x09, 0x01, 0x02, 0x80];
    client.handle_datagram(Duration::ZERO, 10, SOURCE, &bytes);
    assert!(matches!(
        events(&mut client).as_slice(),
        [Event::Failed(ClientError::Version { theirs: 9 })]
    ));
}

#[test]
fn abort_tells_the_agent_only_when_it_may_be_at_work() {
    let mut idle = found();
    idle.abort(Code::CANCELLED, "Interrupted");
    assert!(sent(&mut idle).is_empty());
    let mut client = waiting();
    client.abort(Code::FAILED, &"é".repeat(200));
    let transmits = sent(&mut client);
    let [transmit] = transmits.as_slice() else {
        panic!("{transmits:?}");
    };
    let (transaction, message) = VmMessage::decode(&transmit.bytes).unwrap();
    assert_eq!(transaction, MOVE);
    assert!(matches!(message, VmMessage::MigrationAbort(abort) if abort.0.text.len() <= 255));
}

#[test]
fn phase_that_comes_late_is_not_shown() {
    let mut client = waiting();
    for phase in [
        Phase::Copying,
        Phase::Ready,
        Phase::Switching,
        Phase::Copying,
    ] {
        client.handle_datagram(Duration::ZERO, 10, SOURCE, &progress(phase).encode(MOVE));
    }
    let phases: Vec<Phase> = events(&mut client)
        .into_iter()
        .filter_map(|event| match event {
            Event::Progress(progress) => Some(progress.phase),
            _ => None,
        })
        .collect();
    assert_eq!(phases, [Phase::Copying, Phase::Switching]);
}

/// Fate of one datagram in the network: the delays (ms) of its copies; none for a loss.
fn fate() -> impl Strategy<Value = Vec<u64>> {
    prop_oneof![
        3 => prop::collection::vec(0_u64..50, 1..3),
        1 => prop::collection::vec(50_u64..500, 1..4),
        2 => Just(Vec::new()),
    ]
}

/// The agents as the client sees them: each request gets the answer of its time.
fn agents(
    message: &VmMessage,
    now: Duration,
    started: &mut Option<Duration>,
) -> (Ipv6Addr, VmMessage) {
    match message {
        VmMessage::AgentSearch(_) => (SOURCE, reply()),
        VmMessage::MigrationRequest(_) => (SOURCE, response()),
        _ => {
            let age = now - *started.get_or_insert(now);
            match age.as_millis() {
                0..1000 => (SOURCE, progress(Phase::Copying)),
                1000..1200 => (SOURCE, progress(Phase::Switching)),
                _ => (DESTINATION, progress(Phase::Completed)),
            }
        }
    }
}

proptest! {
    /// The search gives up after 10 s; about 14 requests suffice unless nearly all are lost.
    #[test]
    fn move_completes_once_over_a_bad_network(
        fates in prop::collection::vec(fate(), 40..80),
    ) {
        prop_assume!(fates.windows(14).all(|w| w.iter().filter(|f| !f.is_empty()).count() >= 4));
        let mut client = client();
        let mut fates = fates.iter().cycle();
        let mut arrivals: Vec<(Duration, u32, Ipv6Addr, Vec<u8>)> = Vec::new();
        let mut started = None;
        let mut now = Duration::ZERO;
        let mut seen = Vec::new();
        while now < Duration::from_secs(300) {
            while let Some(transmit) = client.poll_transmit() {
                let (transaction, message) = VmMessage::decode(&transmit.bytes).unwrap();
                let (from, answer) = agents(&message, now, &mut started);
                for delay in fates.next().unwrap() {
                    let at = now + Duration::from_millis(*delay);
                    arrivals.push((at, transmit.ifindex, from, answer.encode(transaction)));
                }
            }
            while let Some(event) = client.poll_event() {
                match &event {
                    Event::Found(_) => client.request(now, "vms2".to_owned(), None),
                    Event::Prepared(_) => client.ready(now, MigrationReady::default()),
                    Event::Progress(_) => continue,
                    Event::Completed(_) | Event::Failed(_) => {}
                }
                seen.push(event);
            }
            arrivals.sort_by_key(|arrival| arrival.0);
            let arrival = arrivals.first().map(|arrival| arrival.0);
            let Some(next) = arrival.into_iter().chain(client.poll_timeout()).min() else {
                break;
            };
            now = now.max(next);
            while arrivals.first().is_some_and(|arrival| arrival.0 <= now) {
                let (_, ifindex, from, bytes) = arrivals.remove(0);
                client.handle_datagram(now, ifindex, from, &bytes);
            }
            client.handle_timeout(now);
        }
        prop_assert!(
            matches!(seen.as_slice(), [Event::Found(_), Event::Prepared(_), Event::Completed(_)]),
            "{:?}", seen
        );
    }

    #[test]
    fn garbage_changes_nothing(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let mut client = waiting();
        client.handle_datagram(Duration::ZERO, 10, SOURCE, &bytes);
        prop_assert!(events(&mut client).is_empty());
    }
}
