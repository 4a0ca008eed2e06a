//! Foreign programs and filters, attached before and after the agent's programs.

use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, Xdp, XdpMode};
use common::maps::{Delivered, DeliveredKey};
use roamcast::datapath::{Datapath, DatapathConfig, Hook, Program, UplinkHook, object};
use support::bridged::{Bridged, udp};
use support::host::{has_tcx, tc_hooks};
use support::limits::Limits;
use support::netns::{privileged, wait_for};
use support::tended::views;

use super::{assert_both_work, config};

/// A foreign program on the TAP's egress, which counts in maps of its own: a second instance of
/// `gate`.
struct Foreign(Ebpf);

impl Foreign {
    fn attach_first() -> Self {
        let mut ebpf = Ebpf::load(object::HOST).unwrap();
        let program: &mut SchedClassifier = ebpf.program_mut("gate").unwrap().try_into().unwrap();
        program.load().unwrap();
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        program
            .attach_with_options("vnet0", TcAttachType::Egress, options)
            .unwrap();
        Self(ebpf)
    }

    fn id(&self) -> u32 {
        let program: &SchedClassifier = self.0.program("gate").unwrap().try_into().unwrap();
        program.info().unwrap().id()
    }

    fn packets(&self) -> u64 {
        let map: HashMap<&MapData, DeliveredKey, Delivered> =
            self.0.map("DELIVERED").unwrap().try_into().unwrap();
        map.iter().map(|entry| entry.unwrap().1.packets).sum()
    }
}

#[test]
fn foreign_tcx_program_and_ours_both_run_and_status_tells_the_order() {
    if !privileged() || !has_tcx() {
        return;
    }
    for is_before in [true, false] {
        let setup = Bridged::new();
        setup.host.run_with_bpffs(|bpffs| {
            let config = config(bpffs, Hook::Tcx);
            let (datapath, foreign) = if is_before {
                let foreign = Foreign::attach_first();
                (setup.attach(&config), foreign)
            } else {
                let datapath = setup.attach(&config);
                (datapath, Foreign::attach_first())
            };
            let before = views(&datapath, setup.ifindex)[&Program::Gate]
                .before
                .clone();
            if is_before {
                assert_eq!(before, Vec::<String>::new(), "ours goes to the head");
            } else {
                assert_eq!(before, [format!("gate (program {})", foreign.id())]);
            }
            assert!(datapath.survey().unwrap().is_empty());
            let frame = udp(b"both");
            setup.sender.send(&frame);
            setup.received_up_to(&frame);
            let delivered = datapath.delivered(Some(setup.ifindex)).unwrap();
            assert_eq!(delivered[0].1.packets, 1);
            assert_eq!(foreign.packets(), 1);
            assert_both_work(&setup, &datapath, 1);
        });
    }
}

#[test]
fn foreign_clsact_is_used_and_what_is_before_us_on_it_is_told() {
    if !privileged() {
        return;
    }
    for preference in [1, 5] {
        let setup = Bridged::new();
        let limits = Limits {
            namespace: &setup.host,
            tap: "vnet0",
        };
        limits.must("qdisc add dev TAP clsact");
        let filter = format!(
            "filter add dev TAP egress protocol ip prio {preference} u32 match u32 0 0 flowid :1"
        );
        limits.must(&filter);
        setup.host.run_with_bpffs(|bpffs| {
            let datapath = setup.attach(&config(bpffs, Hook::Filter));
            let views = views(&datapath, setup.ifindex);
            for view in views.values() {
                assert_eq!(view.qdisc.as_deref(), Some("clsact"));
            }
            let first: &[&str] = if preference == 1 {
                &["u32 (preference 1)"]
            } else {
                &[]
            };
            assert_eq!(views[&Program::Gate].before, first);
            assert_both_work(&setup, &datapath, 1);
            datapath.detach_port(setup.ifindex).unwrap();
            assert!(
                limits.show("filter show dev TAP egress").contains("u32"),
                "it stays"
            );
        });
    }
}

#[test]
fn filter_that_somebody_adds_to_the_uplink_does_not_disturb_ours() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    let limits = Limits {
        namespace: &setup.host,
        tap: "up0",
    };
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = Datapath::load(&config(bpffs, Hook::Filter)).unwrap();
        let up0 = setup.host.ifindex("up0");
        datapath.attach_uplink(up0, "up0").unwrap();
        for side in ["ingress", "egress"] {
            limits.must(&format!(
                "filter add dev TAP {side} protocol all u32 match u32 0 0 flowid :1"
            ));
        }
        let before = |it: &str| {
            views(&datapath, up0)
                .into_values()
                .find(|view| view.program.name() == it)
        };
        for program in ["uplink", "leak"] {
            let view = before(program).unwrap();
            assert!(view.is_there && view.before.is_empty(), "{view:?}");
            assert_eq!(view.qdisc.as_deref(), Some("clsact"));
        }
        datapath.detach_uplink(up0).unwrap();
        assert!(
            limits.show("filter show dev TAP ingress").contains("u32"),
            "it stays"
        );
    });
}

fn foreign_xdp() -> Result<Ebpf, String> {
    let mut ebpf = Ebpf::load(object::HOST).unwrap();
    let program: &mut Xdp = ebpf.program_mut("uplink_xdp").unwrap().try_into().unwrap();
    program.load().unwrap();
    let attached = program.attach("up0", XdpMode::Skb);
    attached.map_err(|error| format!("{error:?}"))?;
    Ok(ebpf)
}

#[test]
fn foreign_xdp_program_on_the_uplink_leaves_tc_to_us_and_is_told() {
    if !privileged() {
        return;
    }
    for hook in tc_hooks() {
        let setup = Bridged::new();
        setup.host.run_with_bpffs(|bpffs| {
            let config = DatapathConfig {
                uplink_hook: Some(UplinkHook::XdpGeneric),
                ..config(bpffs, hook)
            };
            let foreign = foreign_xdp().unwrap();
            let xdp: &Xdp = foreign.program("uplink_xdp").unwrap().try_into().unwrap();
            let id = xdp.info().unwrap().id();
            let datapath = Datapath::load(&config).unwrap();
            let up0 = setup.host.ifindex("up0");
            assert_eq!(datapath.attach_uplink(up0, "up0").unwrap().hook, hook);
            let of = |program| views(&datapath, up0).remove(&program).unwrap();
            let expected = format!("XDP program uplink_xdp (program {id})");
            assert_eq!(of(Program::Uplink).before, [expected]);
            assert_eq!(of(Program::Leak).before, Vec::<String>::new());
            drop(foreign);
            wait_for("the foreign program to go", || {
                of(Program::Uplink).before.is_empty().then_some(())
            });
        });
    }
}

#[test]
fn xdp_program_of_ours_is_not_pushed_out() {
    if !privileged() {
        return;
    }
    for hook in tc_hooks() {
        let setup = Bridged::new();
        setup.host.run_with_bpffs(|bpffs| {
            let config = DatapathConfig {
                uplink_hook: Some(UplinkHook::XdpGeneric),
                ..config(bpffs, hook)
            };
            let datapath = Datapath::load(&config).unwrap();
            let up0 = setup.host.ifindex("up0");
            let attached = datapath.attach_uplink(up0, "up0").unwrap();
            assert_eq!(attached.hook, Hook::XdpGeneric);
            assert!(foreign_xdp().is_err(), "ours is a link");
            let view = views(&datapath, up0).remove(&Program::Uplink).unwrap();
            assert!(view.is_there && view.before.is_empty(), "{view:?}");
        });
    }
}
