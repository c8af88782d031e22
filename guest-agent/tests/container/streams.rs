//! Standard streams, exit codes and signals.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;

use rvm_protocol::{ExitStatus, ProcessId};

use crate::host::{Host, container, process, read_all, shell};

crate::tests![
    output_and_error_stay_apart_and_the_code_arrives,
    input_is_passed_on_with_its_end,
    megabytes_go_through_unchanged,
    a_signal_is_told_as_such,
    a_signal_of_the_host_arrives,
    a_closed_input_does_not_end_the_process,
    a_reader_that_goes_away_ends_the_writer,
    output_that_nobody_reads_does_not_block_the_agent,
    orphans_of_the_first_process_end_with_it,
];

fn output_and_error_stay_apart_and_the_code_arrives() {
    let outcome = Host::new().run(&container(&shell("echo out; echo err >&2; exit 3")));
    assert_eq!(outcome.status, ExitStatus::Code(3));
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
}

fn input_is_passed_on_with_its_end() {
    let mut host = Host::new();
    let streams = host.start(&container(&process(&["cat"]))).unwrap();
    host.stdin(&streams).write_all(b"x\n").unwrap();
    assert_eq!(host.finish(ProcessId::INIT, streams).success(), "x\n");
}

fn megabytes_go_through_unchanged() {
    let mut host = Host::new();
    let streams = host.start(&container(&process(&["cat"]))).unwrap();
    let sent: Vec<u8> =
        (0..20_000_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (mut stdin, mut stdout) = (host.stdin(&streams), host.stdout(&streams));
    let copy = sent.clone();
    let writer = thread::spawn(move || {
        stdin.write_all(&copy).unwrap();
        stdin.shutdown(Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    stdout.read_to_end(&mut received).unwrap();
    writer.join().unwrap();
    assert!(received == sent, "{} bytes of {} came back", received.len(), sent.len());
    assert_eq!(host.exited(ProcessId::INIT), ExitStatus::Code(0));
}

fn a_signal_is_told_as_such() {
    // The first process of a pid namespace cannot be killed from within; its child can.
    let outcome = Host::new().run(&container(&shell("sh -c 'kill -9 $$'; echo $?")));
    assert_eq!(outcome.success(), "137\n");
}

fn a_signal_of_the_host_arrives() {
    let mut host = Host::new();
    let streams = host.start(&container(&process(&["sleep", "1000"]))).unwrap();
    host.signal(0, libc::SIGKILL, false).unwrap();
    assert_eq!(host.finish(ProcessId::INIT, streams).status, ExitStatus::Signal(9));
    assert!(host.signal(0, libc::SIGKILL, false).is_err());
}

fn a_closed_input_does_not_end_the_process() {
    let mut host = Host::new();
    let streams = host.start(&container(&shell("exec <&-; echo closed; read -t 1 x; echo on"))).unwrap();
    assert_eq!(host.finish(ProcessId::INIT, streams).stdout, "closed\non\n");
}

fn a_reader_that_goes_away_ends_the_writer() {
    let mut host = Host::new();
    let endless = "while echo yes; do :; done 2>/dev/null; sh -c 'while echo y; do :; done'; echo $? >&2";
    let streams = host.start(&container(&shell(endless))).unwrap();
    let stdout = host.stdout(&streams);
    stdout.shutdown(Shutdown::Both).unwrap();
    let stderr = read_all(host.stderr(&streams));
    host.exited(ProcessId::INIT);
    drop(stderr);
}

fn output_that_nobody_reads_does_not_block_the_agent() {
    let mut host = Host::new();
    let spec = container(&shell("dd if=/dev/zero bs=1M count=8 2>/dev/null; echo done >&2"));
    let streams = host.start(&spec).unwrap();
    // The agent answers although the output is stuck.
    host.signal(0, 0, false).unwrap();
    assert_eq!(host.finish(ProcessId::INIT, streams).stderr, "done\n");
}

fn orphans_of_the_first_process_end_with_it() {
    let outcome = Host::new().run(&container(&shell("sleep 1000 & sleep 1000 & echo gone")));
    assert_eq!(outcome.success(), "gone\n");
}
