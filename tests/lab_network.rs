//! x
#[test]
fn up() {
    let t = std::time::Instant::now();
    let lab = lab::Lab::up(lab::LabConfig::new("labx")).unwrap();
    println!("up {:?}", t.elapsed());
    let t = std::time::Instant::now();
    println!("{:?}", lab.vms1().output(lab.vms1().virsh().args(["list"])));
    println!("{:?}", t.elapsed());
    let t = std::time::Instant::now();
    println!(
        "{:?}",
        lab.vms1()
            .output(
                lab.vms1()
                    .command("virsh")
                    .args(["-c", &lab.vms2().uri(), "capabilities"])
            )
            .map(|s| s.len())
    );
    println!("{:?}", t.elapsed());
    println!("{:?}", lab.router().status());
    for n in ["switch1", "vms2"] {
        let n = lab.node(n).unwrap();
        println!(
            "{}",
            n.output(n.command("bridge").args(["-d", "mdb", "show"]))
                .unwrap()
        );
        println!(
            "{}",
            n.output(n.command("ip").args(["-d", "link", "show", "br0"]))
                .unwrap()
        );
    }
    let t = std::time::Instant::now();
    lab.down().unwrap();
    println!("down {:?}", t.elapsed());
}
