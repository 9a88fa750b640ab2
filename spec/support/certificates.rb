# frozen_string_literal: true

require "openssl"

# An authority of one's own, and what it certifies, as files in a folder of the example's.
class Certificates
  # What a file says a server or a client is: the paths of its certificate and its key.
  Pair = Struct.new(:cert, :key)

  # @return [String] a file with the authority's certificate
  attr_reader :ca_file

  def initialize
    @folder = Scratch.folder
    @serial = 0
    @ca_key = OpenSSL::PKey::EC.generate("prime256v1")
    @ca = certificate("authority of the specs", @ca_key, 0..3600, ca: true)
    @ca_file = write("ca.crt", @ca.to_pem)
  end

  # @param name [String] of the files
  # @param names [Array<String>] subject alternative names, like "DNS:localhost"
  # @param valid [Range<Integer>] seconds from now
  # @return [Pair]
  def pair(name, names: ["DNS:localhost", "IP:127.0.0.1"], valid: -60..3600)
    key = OpenSSL::PKey::EC.generate("prime256v1")
    cert = certificate(name, key, valid, names: names)
    Pair.new(write("#{name}.crt", cert.to_pem), write("#{name}.key", key.private_to_pem))
  end

  # @return [String] a folder with the authority's certificate, and with something else
  def ca_path
    folder = File.join(@folder, "authorities")
    FileUtils.mkdir_p(folder)
    FileUtils.cp(@ca_file, File.join(folder, "a.crt"))
    File.write(File.join(folder, "README"), "no certificate")
    folder
  end

  # @param pair [Pair] the server's
  # @return [Hash{Symbol => String}] directives for redis-server; clients need no certificate
  def directives(pair, **more)
    {"tls-cert-file": pair.cert, "tls-key-file": pair.key, "tls-ca-cert-file": @ca_file, "tls-auth-clients": "no"}.merge(more)
  end

  private

  def certificate(name, key, valid, names: nil, ca: false)
    cert = OpenSSL::X509::Certificate.new
    cert.version = 2
    cert.serial = @serial += 1
    cert.subject = OpenSSL::X509::Name.new([["CN", name]])
    cert.issuer = ca ? cert.subject : @ca.subject
    cert.public_key = key
    cert.not_before = Time.now + valid.begin
    cert.not_after = Time.now + valid.end
    extensions = OpenSSL::X509::ExtensionFactory.new(ca ? cert : @ca, cert)
    cert.add_extension(extensions.create_extension("basicConstraints", "CA:#{ca.to_s.upcase}", true))
    cert.add_extension(extensions.create_extension("subjectAltName", names.join(","))) if names
    cert.sign(@ca_key, "SHA256")
  end

  def write(name, text)
    File.join(@folder, name).tap { |file| File.write(file, text) }
  end
end
