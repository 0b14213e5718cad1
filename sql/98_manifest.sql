-- The manifest: which functions this installation has made, and a checksum of each. emergency_stop_faults() compares it
-- with what is there: it finds a function that is missing, or is not the one that was installed, before it is needed.

-- installed_functions(): the manifest, as {"get_job(text)": "e3b0c44298fc1c14...", ...}.
-- function_faults() makes the checksums in the same way. If it did not, 99_end.sql would refuse the installation.
DO $$
DECLARE
    v_functions jsonb;
    v_statement text;
BEGIN
    -- This transaction has written these rows of the catalog, itself or in a savepoint of it. Others that are committed
    -- meanwhile do not have our search_path.
    SELECT jsonb_object_agg(p.oid::regprocedure, encode(sha256(convert_to(concat_ws(  -- md5() fails where FIPS rules
        ' ', p.prosrc, p.prosecdef, p.provolatile, p.proisstrict, p.proconfig), 'UTF8')), 'hex')) INTO v_functions
    FROM pg_proc p
    WHERE p.pronamespace = to_regnamespace(quote_ident(current_schema()))
      AND age(p.xmin) <= age(pg_current_xact_id()::xid)
      AND p.proconfig @> ARRAY['search_path=' || current_setting('search_path')]
      AND p.proname <> 'installed_functions';
    EXECUTE format('
        CREATE OR REPLACE FUNCTION installed_functions()
        RETURNS jsonb LANGUAGE sql IMMUTABLE SET search_path FROM CURRENT
        AS %L', format('SELECT %L::jsonb', v_functions));

    -- PUBLIC may execute none of the functions that the manifest lists, nor the manifest. A role that had a right on a
    -- function that was dropped gets it on the one that took its place. Default privileges of the installer may have
    -- opened the records for more than reading. Triggers have their functions now.
    FOR v_statement IN
        SELECT format('REVOKE ALL ON FUNCTION installed_functions(), %s FROM PUBLIC', string_agg(f.signature, ', '))
        FROM jsonb_object_keys(v_functions) AS f (signature)
        UNION ALL
        SELECT format('GRANT EXECUTE ON FUNCTION %s TO %s', f.signature, r.role::oid::regrole)
        FROM jsonb_object_keys(v_functions) AS f (signature)
        JOIN jsonb_to_recordset(current_setting('beacon_stop.rights')::jsonb) AS r (function text, role oid)
            ON starts_with(f.signature, r.function || '(')
        WHERE NOT has_function_privilege(r.role, f.signature, 'EXECUTE')
        UNION ALL
        SELECT format('REVOKE %s ON %s FROM %s', g.privilege_type, c.oid::regclass,
                      CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END)
        FROM pg_class c, aclexplode(c.relacl) AS g
        WHERE c.oid IN (to_regclass('emergency_stops'), to_regclass('emergency_stops_id_seq'),
                        to_regclass('batch_changes'), to_regclass('batch_changes_id_seq'))
          AND g.grantee <> c.relowner AND (g.privilege_type <> 'SELECT' OR g.grantee = 0 OR c.relkind = 'S')
        UNION ALL
        SELECT s.statement FROM installation_steps() AS s
    LOOP
        EXECUTE v_statement;
    END LOOP;
END;
$$;
