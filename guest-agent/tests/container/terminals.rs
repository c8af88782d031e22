//! Terminals.

use rvm_protocol::{ExitStatus, ProcessId, Request};

use crate::host::{Host, container, process, read_all, read_until, shell, type_line};

crate::tests![
    a_terminal_is_the_streams_and_the_console,
    a_terminal_has_its_size_and_can_be_resized,
    a_terminal_takes_input_and_signals,
    the_last_words_of_a_terminal_arrive,
    an_exec_gets_a_terminal_of_its_own,
    resizing_what_has_no_terminal_fails,
];

fn a_terminal_is_the_streams_and_the_console() {
    let mut host = Host::new();
    let spec = container(&shell(
        "tty; stat -c %t:%T /dev/console /dev/pts/0; echo console > /dev/console; test -t 2; echo $?",
    ));
    let stream = host.start_on_terminal(&spec, 24, 80);
    let out = read_all(stream);
    assert_eq!(host.exited(ProcessId::INIT), ExitStatus::Code(0));
    assert_eq!(out.join().unwrap(), "/dev/pts/0\r\n88:0\r\n88:0\r\nconsole\r\n0\r\n");
}

fn a_terminal_has_its_size_and_can_be_resized() {
    let mut host = Host::new();
    let spec = container(&shell("stty size; read line; stty size"));
    let mut stream = host.start_on_terminal(&spec, 33, 77);
    read_until(&mut stream, "33 77\r\n");
    host.request(Request::Resize { process: ProcessId::INIT, rows: 50, columns: 132 }).unwrap();
    type_line(&mut stream, "");
    read_until(&mut stream, "50 132\r\n");
    assert_eq!(host.exited(ProcessId::INIT), ExitStatus::Code(0));
}

fn a_terminal_takes_input_and_signals() {
    let mut host = Host::new();
    let spec =
        container(&shell("trap 'echo interrupted; exit 4' INT; echo ready; while :; do sleep 1; done"));
    let mut stream = host.start_on_terminal(&spec, 24, 80);
    read_until(&mut stream, "ready\r\n");
    use std::io::Write;
    stream.write_all(b"\x03").unwrap();
    read_until(&mut stream, "interrupted");
    assert_eq!(host.exited(ProcessId::INIT), ExitStatus::Code(4));
}

fn the_last_words_of_a_terminal_arrive() {
    let mut host = Host::new();
    let spec = container(&shell("i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; echo end"));
    let out = read_all(host.start_on_terminal(&spec, 24, 80)).join().unwrap();
    assert_eq!(out.lines().count(), 3001);
    assert!(out.ends_with("line 2999\r\nend\r\n"));
    assert_eq!(host.exited(ProcessId::INIT), ExitStatus::Code(0));
}

fn an_exec_gets_a_terminal_of_its_own() {
    let mut host = Host::new();
    let streams = host.start(&container(&process(&["cat"]))).unwrap();
    let mut stream = host.exec_on_terminal(1, &shell("tty; sleep 1000 & read x; echo got $x; exit 6"));
    read_until(&mut stream, "/dev/pts/0\r\n");
    type_line(&mut stream, "word");
    read_until(&mut stream, "got word\r\n");
    // Although an orphan still sits at the terminal.
    assert_eq!(host.exited(ProcessId(1)), ExitStatus::Code(6));
    assert_eq!(host.finish(ProcessId::INIT, streams).status, ExitStatus::Code(0));
}

fn resizing_what_has_no_terminal_fails() {
    let mut host = Host::new();
    let streams = host.start(&container(&process(&["cat"]))).unwrap();
    let resize = Request::Resize { process: ProcessId::INIT, rows: 1, columns: 1 };
    assert_eq!(host.request(resize).unwrap_err().message, "the process has no terminal");
    host.finish(ProcessId::INIT, streams);
}
