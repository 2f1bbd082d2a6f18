"""`master = "etcd"`: the hosts of a group elect who coordinates it by a lease in a real etcd, which is killed, started again, and cut off.

The hosts, remotes and the chain are those of `test_several_hosts`. A lost host stops points, whoever coordinates, so that elections are seen
where a master loses etcd and not its host, or comes back as a host."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading

from certificates import Authority
from sites import die_with_parent, run, wait_for
from test_several_hosts import REMOTES, SeveralHosts


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Etcd:
    """One etcd server on the loopback."""

    def __init__(self, directory, scheme="http", options=()):
        self.directory, self.scheme, self.options = os.path.join(directory, "etcd"), scheme, options
        self.client, self.peer = free_port(), free_port()
        self.url = f"{scheme}://127.0.0.1:{self.client}"
        self.process = None

    def start(self):
        with open(f"{self.directory}.log", "a") as log:
            self.process = subprocess.Popen(
                ["etcd", "--data-dir", self.directory, "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
                 "--listen-peer-urls", f"http://127.0.0.1:{self.peer}", "--log-level", "error",
                 "--initial-advertise-peer-urls", f"http://127.0.0.1:{self.peer}",
                 "--initial-cluster", f"default=http://127.0.0.1:{self.peer}", *self.options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent)
        wait_for(self.answers, 20, what="etcd listens")
        return self

    def answers(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.client), 1):
            return True
        return False

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None


class Proxy:
    """Passes connections on to a port, until it is cut; new ones while it `takes` them."""

    takes = True

    def __init__(self, port):
        self.port, self.ends, self.is_cut = port, [], False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                if not self.takes:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.port))
                self.ends += [near, far]
                for way, source, sink in ((self.pump, near, far), (self.answer, far, near)):
                    threading.Thread(target=way, args=(source, sink), daemon=True).start()

    @staticmethod
    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def answer(self, source, sink):
        self.pump(source, sink)

    def cut(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        for end in [self.listener, *self.ends]:
            with contextlib.suppress(OSError):
                end.close()


class Elections(SeveralHosts):
    def elect(self, endpoints=None, lines="", scheme="http", options=(), lease="2s"):
        """`endpoints`: of some hosts, in place of etcd's own."""
        self.several('master = "etcd"', start=False)
        self.etcd = Etcd(self.directory, scheme, options)
        self.addCleanup(self.etcd.kill)
        self.etcd.start()
        for name, host in self.hosts.items():
            url = (endpoints or {}).get(name, lambda: self.etcd.url)()
            with open(host.config, "a") as file:
                file.write(f'[coordination]\nendpoints = ["{url}"]\nlease = "{lease}"\n{lines}')

    def masters(self):
        """Every site that was elected, with the epoch, in the order of the epochs."""
        found = []
        for name, host in self.hosts.items():
            with open(host.log) as file:
                found += [(int(epoch), name) for epoch in re.findall(r"coordinates the group, by etcd, in epoch (\d+)", file.read())]
        return sorted(found)

    def test_a_killed_master_is_followed_and_comes_back_as_a_host(self):
        self.elect()
        self.start_all()
        self.begin_chain()
        self.chain.expect_losses()
        before = self.next_point()
        epoch, name = self.masters()[-1]
        self.hosts[name].kill()
        wait_for(lambda: self.masters()[-1][1] != name, 20, what="another host is elected")
        self.hosts[name].start()
        number = self.next_point(before + 1, 30)
        self.cut(number)
        self.assertGreater(self.masters()[-1][0], epoch)
        self.assertNotEqual(self.masters()[-1][1], name, "who has the lease keeps it")
        self.chain.stop()

    def test_a_master_that_stops_gives_its_lease_back(self):
        self.elect(lease="60s")
        self.start_all()
        _, name = self.masters()[-1]
        self.hosts[name].stop()
        wait_for(lambda: self.masters()[-1][1] != name, 20, what="another host is elected, long before the lease is over")

    def test_without_etcd_points_stop_and_hosts_go_on(self):
        self.elect()
        self.start_all()
        self.begin_chain()
        self.next_point()
        self.etcd.kill()
        wait_for(lambda: all("coordinate" in (host.group().get("notice") or "") for host in self.hosts.values()), 20,
                 what="every host says that nobody coordinates")
        stopped, written = self.common()[-1], self.chain.acknowledged
        wait_for(lambda: self.chain.acknowledged > written + 500, 20, what="hosts go on")
        self.assertEqual(self.common()[-1], stopped, "no point without a coordinator")
        self.etcd.start()
        self.cut(self.next_point(stopped, 30))
        self.chain.stop()

    def test_a_master_that_is_cut_off_from_etcd_is_fenced_and_followed(self):
        proxies = {}

        def through(name):
            def url():
                proxies[name] = Proxy(self.etcd.client)
                self.addCleanup(proxies[name].cut)
                return proxies[name].url
            return url
        self.elect({name: through(name) for name in REMOTES})
        self.start_all()
        self.begin_chain()
        before = self.next_point()
        epoch, name = self.masters()[-1]
        proxies[name].cut()
        wait_for(lambda: self.masters()[-1][1] != name, 20, what="another host is elected")
        number = self.next_point(before + 5, 30)
        self.cut(number)
        self.assertIn("coordinate", self.hosts[name].group().get("notice") or "", "who was cut off says so")
        self.assertGreater(self.masters()[-1][0], epoch)
        self.chain.stop()

    def test_a_master_that_sleeps_past_its_lease_decides_nothing_when_it_wakes(self):
        self.elect()
        self.start_all()
        self.begin_chain()
        self.chain.expect_losses()
        self.next_point()
        epoch, name = self.masters()[-1]
        process = self.hosts[name].process
        process.send_signal(signal.SIGSTOP)
        try:
            wait_for(lambda: self.masters()[-1][1] != name, 20, what="another host is elected")
        finally:
            process.send_signal(signal.SIGCONT)
        with self.told(master=name, epoch=epoch):
            after = self.common()[-1]
            self.cut(self.next_point(after + 3, 30))
            self.assertNotEqual(self.masters()[-1][1], name)
        self.chain.stop()

    def test_certificates_of_both_sides(self):
        authority = Authority(os.path.join(self.directory, "etcd-tls"))
        # etcd's gateway calls etcd with the server's certificate.
        authority.sign(authority.directory, "server", "localhost",
                       ["ip_address = 127.0.0.1", "dns_name = localhost", "tls_www_server", "tls_www_client"])
        shown = authority.client(os.path.join(self.directory, "host-tls"), "farcopy")
        self.elect(
            scheme="https", lines=f'tls_ca = "{authority.certificate}"\ntls_certificate = "{shown}/client-cert.pem"\n'
                                  f'tls_key = "{shown}/client-key.pem"\n',
            options=["--cert-file", f"{authority.directory}/server-cert.pem", "--key-file", f"{authority.directory}/server-key.pem",
                     "--trusted-ca-file", authority.certificate, "--client-cert-auth"])
        self.start_all()
        self.next_point()

    def test_a_user_logs_in_and_a_wrong_password_is_told(self):
        self.elect(lines=f'user = "root"\npassword_file = "{self.directory}/password"\n')
        with open(f"{self.directory}/password", "w") as file:
            file.write("secret\n")
        environment = {**os.environ, "ETCDCTL_API": "3"}
        for words in (["user", "add", "root:secret"], ["user", "grant-role", "root", "root"], ["auth", "enable"]):
            run("etcdctl", "--endpoints", self.etcd.url, *words, env=environment)
        self.start_all()
        self.next_point()
        host = self.hosts["east3"]
        host.stop()
        with open(f"{self.directory}/password", "w") as file:
            file.write("wrong\n")
        host.start()
        wait_for(lambda: "authentication failed" in (host.group().get("notice") or ""), 20, what="the reason is told")
