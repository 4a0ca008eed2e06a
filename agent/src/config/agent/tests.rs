use super::*;
use crate::hypervisor::libvirt::MigrateFlags;
use crate::proto::Asker;
use proptest::prelude::*;

const EXAMPLE: &str = include_str!("../../../dist/roamcast.toml");
const MINIMAL: &str = "[agent]\nname = \"a\"\nbridge = \"br0\"\n";

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("r.toml")).map_err(|error| error.to_string())
}

fn refusal(text: &str) -> String {
    parse(text).expect_err("accepted")
}

/// The example file with every commented-out default in force.
fn uncommented() -> String {
    let is_key = |line: &str| line.starts_with('#') && !line.starts_with("# ") && line.len() > 1;
    EXAMPLE
        .lines()
        .map(|line| if is_key(line) { &line[1..] } else { line })
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn example_is_valid() {
    parse(EXAMPLE).unwrap();
}

#[test]
fn example_lets_nothing_move_and_shows_the_rules_that_would() {
    let config = parse(EXAMPLE).unwrap();
    assert!(config.lets_nothing_move());
    let rule: Vec<&str> = EXAMPLE
        .lines()
        .skip_while(|line| *line != "# [[policy.depart]]")
        .take_while(|line| !line.starts_with("# [[") || line.ends_with("]]"))
        .map(|line| line.trim_start_matches("# ").trim_start_matches('#'))
        .collect();
    let config = parse(&format!("{EXAMPLE}\n{}", rule.join("\n"))).unwrap();
    assert!(!config.lets_nothing_move());
    let policy = config.policy;
    assert!(policy.allows_departure("tv-1", "vms2", Asker::Operator));
    assert!(!policy.allows_departure("tv-1", "vms2", Asker::Vm));
    assert!(!policy.allows_departure("db", "vms2", Asker::Operator));
    assert!(policy.allows_arrival("vms2", "tv-1"));
}

#[test]
fn key_that_has_another_name_now_is_refused_with_that_name() {
    let error = refusal(&format!("{MINIMAL}[limits]\nincoming = 12\n"));
    assert_eq!(
        error,
        "r.toml:5: limits.incoming: This key has another name now; write arrivals_at_once, and \
         arrivals_per_peer, in [policy] instead"
    );
}

#[test]
fn peer_cannot_be_given_more_places_than_there_are() {
    let policy = |keys: &str| parse(&format!("{MINIMAL}[policy]\n{keys}\n"));
    assert!(policy("arrivals_at_once = 12\narrivals_per_peer = 12").is_ok());
    for key in ["arrivals_per_peer", "departures_per_peer"] {
        let error = policy(&format!("{key} = 17")).unwrap_err();
        assert!(
            error.starts_with(&format!("r.toml:5: policy.{key}: One peer")),
            "{error}"
        );
    }
    for key in ["arrivals_at_once", "requests_per_minute"] {
        assert!(policy(&format!("{key} = 0")).is_err());
    }
}

#[test]
fn commented_out_keys_of_the_example_are_the_defaults() {
    assert_eq!(parse(&uncommented()), parse(EXAMPLE));
}

#[test]
fn example_mentions_every_key() {
    let keys = "name bridge uplinks uplink_hook mcs site listen control_socket pin_root prefix address listeners \
        sources reports_per_second map_listeners map_sources map_streams map_managed ca by \
        departures_at_once departures_per_peer arrivals_at_once arrivals_per_peer waiting_per_peer \
        requests_per_minute vm_pause_s sources gate_max_s \
        cert key crl admit domains destinations tree_budget_ms join_expiry_s connect_uri migrate_uri \
        enabled servers dns anycast sdp delay_ms silence_ms watch_interval_ms settle_ms hold_ms \
        uri flags encrypt bandwidth_mib downtime_ms max_downtime_ms parallel_connections level format";
    for key in keys.split_whitespace() {
        assert!(
            EXAMPLE.contains(&format!("{key} = ")),
            "{key} is not documented"
        );
    }
}

#[test]
fn minimal_file_has_the_defaults() {
    let config = parse(MINIMAL).unwrap();
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.libvirt, Libvirt::default());
    assert_eq!(config.agent.listen.to_string(), "[::]:47411");
    assert_eq!(config.libvirt.migrate_flags(), Ok(MigrateFlags::default()));
}

#[test]
fn uris_of_a_peer_are_made_from_its_address_unless_the_operator_gives_them() {
    let peer = |keys: &str| {
        let text = format!("{MINIMAL}\n[[peers]]\nname = \"vms2\"\n{keys}\n");
        let peer = parse(&text).unwrap().peers.pop().unwrap();
        (peer.connect_uri(), peer.migrate_uri())
    };
    let pair = |connect: &str, migrate: &str| (connect.to_owned(), migrate.to_owned());
    assert_eq!(
        peer("address = \"[2001:db8::1]:4000\""),
        pair("qemu+tls://[2001:db8::1]/system", "tcp://[2001:db8::1]")
    );
    assert_eq!(
        peer("address = \"vms2.example\""),
        pair("qemu+tls://vms2.example/system", "tcp://vms2.example")
    );
    assert_eq!(
        peer(
            "address = \"::1\"\nconnect_uri = \"qemu+ssh://vms2/system\"\n\
             migrate_uri = \"tcp://10.0.0.1\""
        ),
        pair("qemu+ssh://vms2/system", "tcp://10.0.0.1")
    );
}

#[test]
fn unknown_key_is_named_with_its_line() {
    let text = format!("{MINIMAL}\n[limits]\nlisteners = 5\nlistener = 6\n");
    let error = refusal(&text);
    assert!(
        error.starts_with("r.toml:7: limits.listener: Unknown field"),
        "{error}"
    );
}

#[test]
fn missing_key_is_named() {
    let error = refusal("[agent]\nname = \"a\"\n");
    assert!(
        error.contains("r.toml:1") && error.contains("`bridge`"),
        "{error}"
    );
}

#[test]
fn value_out_of_range_is_named_with_its_range() {
    let error = refusal(&format!("{MINIMAL}[destination]\n\ntree_budget_ms = 5\n"));
    assert_eq!(
        error,
        "r.toml:6: destination.tree_budget_ms: 5 is not in 10 to 10000"
    );
    let error = refusal(&format!("{MINIMAL}[limits]\nlisteners = -1\n"));
    assert_eq!(
        error,
        "r.toml:5: limits.listeners: -1 is not in 1 to 16777216"
    );
}

#[test]
fn bad_element_of_an_array_is_quoted() {
    let error = refusal(&format!(
        "{MINIMAL}[libvirt]\nflags = [\"VIR_MIGRATE_LIVE\",\n \"VIR_MIGRATE_POSTCOPY\"]\n"
    ));
    assert!(
        error.starts_with("r.toml:5: libvirt.flags: \"VIR_MIGRATE_POSTCOPY\""),
        "{error}"
    );
}

#[test]
fn bad_peer_is_named_by_its_place() {
    let error = refusal(&format!(
        "{MINIMAL}[[peers]]\nname = \"b\"\naddress = \"10.0.0.1:99999\"\n"
    ));
    assert!(
        error.starts_with("r.toml:6: peers.0.address: \"10.0.0.1:99999\""),
        "{error}"
    );
}

#[test]
fn syntax_error_has_its_line() {
    let error = refusal("[agent]\nname = \"a\nbridge = \"br0\"\n");
    assert!(error.starts_with("r.toml:2: "), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn conflicts_are_refused() {
    let peer = |name: &str| format!("[[peers]]\nname = \"{name}\"\naddress = \"::1\"\n");
    let cases = [
        (
            format!("{MINIMAL}{}", peer("a")),
            "r.toml:5: peers.0.name: Peer \"a\" has this",
        ),
        (
            format!("{MINIMAL}{}{}", peer("b"), peer("b")),
            "r.toml:8: peers.1.name: Peer \"b\" is listed twice",
        ),
        (
            format!("{MINIMAL}uplinks = [\"br0\"]\n"),
            "r.toml:4: agent.uplinks.0: Uplink \"br0\" is",
        ),
        (
            format!("{MINIMAL}uplinks = [\"e\", \"e\"]\n"),
            "r.toml:4: agent.uplinks.1: Uplink \"e\" is listed twice",
        ),
        (
            format!("{MINIMAL}prefix = \"2001:db8::/64\"\naddress = \"2001:db9::1\"\n"),
            "r.toml:5: agent.address: Address 2001:db9::1 is not in",
        ),
        (
            format!("{MINIMAL}[libvirt]\nflags = [\"VIR_MIGRATE_LIVE\"]\n"),
            "r.toml:5: libvirt.flags: VIR_MIGRATE_PEER2PEER is missing",
        ),
        (
            format!("{MINIMAL}[libvirt]\nencrypt = \"sometimes\"\n"),
            "r.toml:5: libvirt.encrypt: ",
        ),
        (
            format!(
                "{MINIMAL}[libvirt]\nflags = [{MOVE}, \"VIR_MIGRATE_TLS\"]\nencrypt = \"never\"\n"
            ),
            "r.toml:6: libvirt.encrypt: \"never\" contradicts VIR_MIGRATE_TLS",
        ),
        (
            format!(
                "{MINIMAL}[libvirt]\nencrypt = \"always\"\nparallel_connections = 2\nflags = [{MOVE}, \"VIR_MIGRATE_ZEROCOPY\"]\n"
            ),
            "r.toml:5: libvirt.encrypt: \"always\" contradicts VIR_MIGRATE_ZEROCOPY",
        ),
        (
            format!("{MINIMAL}[limits]\nlisteners = 10\nmap_listeners = 9\n"),
            "r.toml:5: limits.listeners: 10 listeners",
        ),
    ];
    for (text, expected) in cases {
        let error = refusal(&text);
        assert!(error.starts_with(expected), "{error}\nfor\n{text}");
    }
}

/// Flags without which no migration goes.
const MOVE: &str = "\"VIR_MIGRATE_LIVE\", \"VIR_MIGRATE_PEER2PEER\"";

#[test]
fn relays_are_used_only_where_one_can_be_found() {
    let section = |text: &str| parse(&format!("{MINIMAL}[relay]\n{text}\n")).unwrap().relay;
    assert!(!section("delay_ms = 10").is_used());
    let found = [
        "servers = [{ name = \"r1\", address = \"2001:db8::1\" }]",
        "dns = \"relays.example\"",
        "anycast = { name = \"r\", address = \"2001:db8::2\" }",
        "sdp = \"/etc/roamcast/tv.sdp\"",
        "sdp = \"http://[::1]:8080/tv.sdp\"",
    ];
    for text in found {
        assert!(section(text).is_used(), "{text}");
        assert!(!section(&format!("{text}\nenabled = false")).is_used());
    }
    assert_eq!(section("").delay, std::time::Duration::from_millis(20));
}

#[test]
fn relay_sections_that_cannot_work_are_refused() {
    let server = |name: &str| format!("{{ name = \"{name}\", address = \"::1\" }}");
    let cases = [
        (
            format!("servers = [{}, {}]", server("r"), server("r")),
            "relay.servers.1.name: Relay \"r\" is listed twice",
        ),
        (
            format!("servers = [{}]", server("a")),
            "relay.servers.0.name: Relay \"a\" has this agent's own name",
        ),
        (
            "dns = \"2001:db8::1\"".to_owned(),
            "relay.dns: \"[2001:db8::1]:47411\" is an address",
        ),
        (
            "name = \"relay.example\"".to_owned(),
            "relay.name: The name belongs to relay.dns",
        ),
        (
            "sdp = \"https://example.org/x\"".to_owned(),
            "relay.sdp: \"https://example.org/x\" cannot be read",
        ),
        (
            "silence_ms = 100\nwatch_interval_ms = 200".to_owned(),
            "relay.watch_interval_ms: Flows looked at every 200 ms",
        ),
        (
            "settle_ms = 2000".to_owned(),
            "relay.settle_ms: 2000 is not in 10 to 1500",
        ),
    ];
    for (text, expected) in cases {
        let error = refusal(&format!("{MINIMAL}[relay]\n{text}\n"));
        assert!(error.contains(expected), "{error}\nfor\n{text}");
    }
}

#[test]
fn policy_allows_only_what_a_rule_names() {
    let config = parse(&format!(
        "{MINIMAL}[[peers]]\nname = \"b\"\naddress = \"::1\"\n\
         [[peers]]\nname = \"c\"\naddress = \"c.example:5\"\n\
         [[policy.depart]]\ndomains = [\"tv-*\"]\ndestinations = [\"c\"]\n\
         [[policy.arrive]]\nsources = [\"b\"]\ndomains = [\"tv-?\"]\n"
    ))
    .unwrap();
    let operator = |domain, destination| {
        let by = Asker::Operator;
        config.policy.allows_departure(domain, destination, by)
    };
    assert!(operator("tv-1", "c"));
    assert!(!operator("tv-1", "b"));
    assert!(!operator("radio", "c"));
    assert!(config.policy.allows_arrival("b", "tv-1"));
    assert!(!config.policy.allows_arrival("b", "tv-10"));
    assert!(!config.policy.allows_arrival("c", "tv-1"));
}

#[test]
fn names_of_agents_are_the_same_in_upper_case() {
    let config = parse(&format!(
        "{MINIMAL}[[peers]]\nname = \"VMS2.Example\"\naddress = \"::1\"\n\
         [[policy.depart]]\ndomains = [\"TV-*\"]\ndestinations = [\"Vms2.*\"]\n\
         [[policy.arrive]]\nsources = [\"VMS?.example\"]\ndomains = [\"*\"]\n"
    ))
    .unwrap();
    assert!(
        config.peer("vms2.example").is_some(),
        "as in its certificate"
    );
    let may_leave = |domain| {
        let policy = &config.policy;
        policy.allows_departure(domain, "vms2.example", Asker::Operator)
    };
    assert!(may_leave("TV-1"));
    assert!(!may_leave("tv-1"), "a domain's name is no agent's");
    assert!(config.policy.allows_arrival("vms2.example", "tv-1"));
    let twice = format!(
        "{MINIMAL}[[peers]]\nname = \"b\"\naddress = \"::1\"\n[[peers]]\nname = \"B\"\naddress = \"::2\"\n"
    );
    let error = refusal(&twice);
    assert!(error.contains("listed twice"), "{error}");
}

#[test]
fn unreadable_and_oversized_files_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing.toml");
    let error = Config::load(&missing).expect_err("loaded");
    assert!(
        error
            .to_string()
            .starts_with("Cannot read the configuration"),
        "{error}"
    );
    let large = directory.path().join("large.toml");
    std::fs::write(&large, vec![b'#'; 2 << 20]).unwrap();
    assert!(matches!(
        Config::load(&large),
        Err(ConfigError::TooLong { .. })
    ));
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused_in_one_line(text in "\\PC{0,200}") {
        if let Err(error) = parse(&text) {
            prop_assert!(!error.contains('\n'));
        }
    }

    #[test]
    fn any_change_of_the_example_is_parsed_or_refused(at in 0..EXAMPLE.len(), byte in 0x20_u8..0x7f) {
        let mut bytes = uncommented().into_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(text) = String::from_utf8(bytes) {
            let _ = parse(&text);
        }
    }
}
