#![allow(clippy::unwrap_used)]
use policy_chain::{
    engine::generation::CarrierChoice, hook::Hook, policy::Registry, replay::Runner, spec::Spec,
};
#[test]
fn smoke() {
    let text = r#"{"version":1,"chains":[
     {"name":"sub","actions":[{"action":"count"}]},
     {"name":"a","attach":[{"device":"eth0","hook":"xdp"}],"selectors":[
      {"selector":"ip_pair","src":"10.0.0.1"},{"selector":"service","port":[80,"1000-2000"]},
      {"selector":"flow","op":"or","keys":[{"local":"10.0.0.1","remote":"10.0.0.2","local_port":5,"remote_port":6,"arg":1000}]},
      {"selector":"prefix","op":"or","keys":[{"prefix":"10.0.0.0/8","arg":1},{"prefix":"10.1.0.0/16","arg":2}]},
      {"selector":"tcp","op":"or"},{"selector":"tcp_flags","all":["syn"]}],
      "actions":[{"action":"strip_option","kind":"mptcp"},{"action":"insert_option","kind":253,"data":"aabb"},{"action":"set_mss","bytes":1000},{"action":"set_window","raw":true,"window":{"from":"element"}},{"action":"count"},
      {"action":"goto","chain":"sub"}]}]}"#;
    let spec = Spec::parse(text, "x.json".as_ref(), Registry::embedded().unwrap()).unwrap();
    for hook in Hook::ALL {
        let t = std::time::Instant::now();
        let mut r = Runner::new(&spec, "a", hook, CarrierChoice::Auto).unwrap();
        println!("{hook} load {:?}", t.elapsed());
        let mut f = vec![0u8; 12];
        f.extend_from_slice(&[8, 0]);
        f.extend_from_slice(&[
            0x45, 0, 0, 48, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        f.extend_from_slice(&[
            0, 80, 0, 6, 0, 0, 0, 1, 0, 0, 0, 0, 0x70, 2, 0x10, 0, 0, 0, 0, 0, 2, 4, 5, 0xb4, 1, 1,
            1, 1,
        ]);
        let o = r.run(&f).unwrap();
        println!("{}", o.to_json(1, &f));
        println!("{:02x?}", o.frame);
    }
}
